"""Before the first step: what trains, on which rows, and with which choices; all of it checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from veneer.adapter.active import active_adapters_of
from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.adapter.embedding import LoRAEmbedding
from veneer.adapter.layers import idle_modules, lora_layers
from veneer.adapter.method import Method
from veneer.adapter.use import adapters, in_use
from veneer.adapter.virtual_forward import idle_virtual_tokens, virtual_tokens_of
from veneer.checks import check_config
from veneer.data.columns import Columnar, column_of, lengths_of
from veneer.data.encode import Example
from veneer.errors import DataError, TrainingError, listed, wrong_argument
from veneer.formats.capture import modules_to_save_of
from veneer.objectives.config import Objective
from veneer.processes.world import World
from veneer.training.choose import choose, explain, hidden_size_of, learning_rate
from veneer.training.config import TrainConfig

DEFAULT = "default"  # the name of an adapter to which nobody gives another


def choose_course(
    model: PreTrainedModel,
    examples: Sequence[Example],
    given: TrainConfig,
    *,
    share_of_rate: float = 1.0,
) -> tuple[TrainConfig, str | None, float]:
    """Return the course without any choice left, what was chosen in words, and the usual rate.

    share_of_rate: of the objective
    """
    active = [config for name, config in adapters(model).items() if name in in_use(model)]
    lengths = lengths_of(examples)
    hidden_size = hidden_size_of(model.config)
    what_trains = active[0] if active else Method("full")
    chosen = choose(
        given,
        lengths,
        what_trains=what_trains,
        hidden_size=hidden_size,
        share_of_rate=share_of_rate,
    )
    usual_lr = learning_rate(
        what_trains,
        hidden_size,
        lora_plus_ratio=given.lora_plus_ratio,
        share_of_rate=share_of_rate,
    )
    return chosen, explain(given, chosen, lengths, hidden_size=hidden_size), usual_lr


def what_trains(
    model: PreTrainedModel, adapter: str = DEFAULT
) -> tuple[dict[str, nn.Parameter], dict[str, Adapter]]:
    """Return the weights that train, by name, and the active adapters, by path; those of `adapter`
    as if it were called "default".

    Raises TrainingError where there are no such weights.
    """
    modules = chain(idle_modules(model), idle_virtual_tokens(model))
    idle = {id(weight) for module in modules for weight in module.parameters()}
    weights = {
        as_default(name, adapter): weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and id(weight) not in idle
    }
    if not weights:
        raise TrainingError("Nothing in this model trains; attach an adapter first.")
    active = {
        as_default(path, adapter): module
        for path, module in model.named_modules()
        if isinstance(module, Adapter) and id(module.lora_B) not in idle
    }
    return weights, active


def let_train(model: PreTrainedModel, name: str) -> None:
    """Let an attached adapter train again, which loading, or attaching another, has frozen. Raises
    AdapterError for a name that is not attached."""
    active_adapters = active_adapters_of(model)
    active_adapters.checked(name)
    config = active_adapters.configs[name]
    for _, layer in lora_layers(model):
        for modules in (layer.adapters, layer.tokens):
            if name in modules:
                modules[name].requires_grad_(True)
        if isinstance(config, LoRA) and config.lora_fa and name in layer.adapters:
            adapter: Any = layer.adapters[name]
            fixed = adapter.lora_B if isinstance(layer, LoRAEmbedding) else adapter.lora_A
            fixed.requires_grad_(False)
    for weight in modules_to_save_of(model, name).values():
        weight.requires_grad_(True)
    virtual = virtual_tokens_of(model)
    if virtual is not None and name in virtual.adapters:
        virtual.adapters[name].requires_grad_(True)


def as_default(path: str, adapter: str) -> str:
    """Return what a weight or module of an adapter is called where the adapter is "default"."""
    for modules in ("adapters", "tokens"):
        own, default = f".{modules}.{adapter}.", f".{modules}.{DEFAULT}."
        path = f"{path}.".replace(own, default, 1)[:-1]
    return path


def check_types(model: object, examples: Sequence[object]) -> None:
    """Raise TypeError for a base instead of its model, and for rows instead of examples."""
    if not isinstance(model, nn.Module):
        raise wrong_argument(model, "A model")
    for example in () if isinstance(examples, Columnar) else examples:
        if not isinstance(example, Example):
            made_by = "examples, skipped = veneer.load_examples(rows, tokenizer)"
            raise wrong_argument(example, f"An Example, made by {made_by},")


def check_objective(objective: Objective, config: TrainConfig, examples: Sequence[Example]) -> None:
    """Raise ConfigError for settings with which an objective cannot be, DataError for rows that are
    not what it learns from. examples: one or two of the rows."""
    if objective.shape == "answers" and any(example.second for example in examples):
        raise DataError("These rows are pairs; name an objective that learns from pairs.")
    contradictions = objective.against(
        context_parallel=config.context_parallel, replay_passes=config.replay_passes
    )
    check_config(config, opening="This run cannot be", rules={}, contradictions=contradictions)
    if objective.shape in ("pairs", "judged") and any(not example.second for example in examples):
        raise DataError(
            f"{objective.objective} learns from rows that are {objective.shape}; make them by "
            f"load_examples(..., shape={objective.shape!r})."
        )


def check_rows(examples: Sequence[Example], held_out: Sequence[Example]) -> None:
    """Raise DataError where there is nothing to learn, at all or from some rows."""
    if not examples:
        raise DataError("There are no rows to train on.")
    empty = [
        rows[int(i)].where
        for rows in (examples, held_out)
        for i in np.flatnonzero(column_of(rows, "label_counts") == 0)
    ]
    if empty:
        raise DataError(f"No token is learnt in {len(empty)} rows: {listed(empty)}.")


def check_same_run(world: World, identity: Mapping[str, Any], lengths: NDArray[np.integer]) -> None:
    """Raise TrainingError where processes have other settings, rows or bases than each other.

    identity: what decides the run's course; lengths: tokens of each row
    """
    if world.size == 1:
        return
    hashes = {
        "settings, rows or base": _hash_of(json.dumps(identity, sort_keys=True, default=str)),
        "lengths of the rows": _hash_of(lengths.tobytes()),
    }
    of_all = world.gather(torch.tensor(list(hashes.values())))  # (processes, hashes)
    for what, column in zip(hashes, of_all.T.tolist(), strict=True):
        if others := [rank for rank, value in enumerate(column) if value != column[0]]:
            raise TrainingError(
                f"The processes are not of one run: {what} of process {listed(map(str, others))} "
                "differ from those of process 0. Start all with the same command, data and model."
            )


def _hash_of(data: bytes | str) -> int:
    """Return 63 bits that tell one content from another."""
    data = data.encode() if isinstance(data, str) else data
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1
