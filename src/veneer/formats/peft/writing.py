"""The settings and tensors in PEFT's files of an adapter: pure, without files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from veneer.adapter.config import LoRA
from veneer.adapter.method import Method
from veneer.errors import AdapterError, listed
from veneer.formats.base_structure import BaseStructure
from veneer.formats.peft import virtual
from veneer.formats.peft.experts import experts_together, nested_keys, taken_for_stacks
from veneer.formats.peft.rules import BELOW, ENDINGS, PREFIX, TOKENS, is_bias
from veneer.formats.state import (
    BIAS,
    FACTORS,
    MAGNITUDE,
    AdapterState,
    StoredTokens,
    int_if_whole,
)


def config_of(state: AdapterState, model_type: str | None = None) -> dict[str, Any]:
    """Return adapter_config.json of an adapter.

    Patterns are whole paths: PEFT sorts patterns on saving, and the first match wins, so that
    patterns that overlap could change their meaning. model_type: of the base, None where it is not
    known.
    """
    if isinstance(state.config, Method):
        return virtual.config_of(state, state.config)
    config, layers = state.config, list(state.layers())
    paths = {layer.path: layer.path for layer in layers}
    by_weight = _by_weight(state, model_type)
    paths |= {path: f"{path}.weight" for path in by_weight}
    ranks = {name: config.rank_of(path) for path, name in paths.items()}
    alphas = {name: int_if_whole(config.alpha_of(path)) for path, name in paths.items()}
    alpha = int_if_whole(config.alpha or 0)
    are_parameters = {layer.path for layer in layers if layer.kind == "parameter"} | by_weight
    parameters = [name for path, name in paths.items() if path in are_parameters]
    modules = _saved_modules(state)
    targets = list(config.targets)
    if parameters or modules or not paths:
        targets = [path for path in paths if path not in are_parameters]
    invocation = [*config.invocation_tokens]
    return {
        "peft_type": "LORA",
        "task_type": state.task or None,
        "base_model_name_or_path": state.hub_name or None,
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else config.dropout,
        "target_modules": targets,
        "target_parameters": parameters or None,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "lora_bias": any(layer.bias is not None for layer in layers),
        "rank_pattern": {name: r for name, r in ranks.items() if r != config.rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "bias": _trained_biases(state),
        "modules_to_save": modules or None,
        "trainable_token_indices": {p: list(t.ids) for p, t in state.trained_tokens.items()}
        or None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    } | ({"alora_invocation_tokens": invocation} if invocation else {})


def tensors_of(state: AdapterState, base: BaseStructure | None = None) -> dict[str, Tensor]:
    """Return an adapter's tensors under PEFT's keys.

    Raises AdapterError for parameters of one module that PEFT's file could not tell apart.
    """
    if isinstance(state.config, Method):
        return virtual.tensors_of(state, state.config)
    tensors: dict[str, Tensor] = {}
    layers = list(state.layers())
    keys = nested_keys(
        (layer.path for layer in layers if layer.kind == "parameter"),
        None if base is None else base.parameters,
    )
    for layer in layers:
        A, B, magnitude = layer.A, layer.B, layer.magnitude
        if layer.kind == "parameter":
            A, B = experts_together(A, B)
        elif A.ndim == 4:  # a convolution of one pixel, and one magnitude a channel
            B = B[:, :, None, None]
            magnitude = None if magnitude is None else magnitude[None, :, None, None]
        names = FACTORS["embedding" if layer.is_embedding else "linear"]
        values = (A, B, magnitude, layer.bias)
        for name, tensor in zip((*names, MAGNITUDE, BIAS), values, strict=True):
            if tensor is not None:
                tensors[f"{PREFIX}{keys.get(layer.path, layer.path)}.{ENDINGS[name]}"] = tensor
    adapted = {layer.path for layer in layers}
    for path, weight in state.modules_to_save.items():
        module, _, leaf = path.rpartition(".")
        below = BELOW if module in adapted else ""
        tensors[f"{PREFIX}{module}{below}.{leaf}"] = weight
    for path, tokens in state.trained_tokens.items():
        if tokens.rows is not None:
            tensors[f"{PREFIX}{path}{TOKENS}"] = tokens.rows
    return tensors


def new_tokens_as_trained(state: AdapterState) -> AdapterState:
    """Return the adapter with its new tokens as trained rows of tokens that the base has.

    Raises AdapterError if the base has no rows for them, since PEFT adds none.
    """
    new = state.new_tokens
    if new is None:
        return state
    if not new.paths:
        raise AdapterError(
            "An adapter with new tokens can be written for PEFT only if its base has rows for them "
            "and a head without a bias; merge it, or write it natively."
        )
    ids = tuple(range(new.start, new.start + len(new.tokens)))
    rows = zip(new.paths, (new.embedding, new.head), strict=False)
    trained = {path: StoredTokens(ids, own) for path, own in rows if own is not None}
    return replace(state, new_tokens=None, trained_tokens=trained)


def _by_weight(state: AdapterState, model_type: str | None) -> set[str]:
    """Return the linear layers that are written as their weights, because PEFT would take their
    names for those of experts. For PEFT the two are the same but for what only layers can have.

    Raises AdapterError where an adapter has that.
    """
    config = state.config
    assert isinstance(config, LoRA)
    layers = {layer.path: layer for layer in state.layers() if layer.kind == "linear"}
    taken = taken_for_stacks(list(layers), model_type)
    if taken and (config.dora or any(layers[path].bias is not None for path in taken)):
        what = "DoRA" if config.dora else "a lora_bias"
        raise AdapterError(
            f"PEFT takes the names of {listed(taken)} for those of experts, over which it has "
            f"no {what.removeprefix('a ')}; merge the adapter, or write it natively."
        )
    return set(taken)


def _saved_modules(state: AdapterState) -> list[str]:
    return sorted({path.rpartition(".")[0] for path in state.modules_to_save if not is_bias(path)})


def _trained_biases(state: AdapterState) -> str:
    """Return PEFT's name for the set of the base's biases that have been trained."""
    adapted = {layer.path for layer in state.layers()}
    owners = {path.rpartition(".")[0] for path in state.modules_to_save if is_bias(path)}
    owners -= {*_saved_modules(state)}
    if not owners:
        return "none"
    return "lora_only" if owners <= adapted else "all"
