"""What a reference model gives the rows of a run: computed once, before the first step, and kept
beside the encoded rows for whoever trains on the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from veneer.adapter.use import base_alone
from veneer.adapter.virtual_forward import virtual_input_count
from veneer.data import cache
from veneer.data.columns import lengths_of
from veneer.data.encode import Example
from veneer.data.packing import StepOrder, idle_rows, pack
from veneer.files import new_file
from veneer.fused.forward import Forward
from veneer.models.evaluating import evaluating
from veneer.objectives.config import Objective
from veneer.objectives.criterion import Criterion, rows_of
from veneer.objectives.preferences import LogProbabilities, Pairs, criterion_of
from veneer.processes.world import World
from veneer.training.beside_rows import place_of
from veneer.training.teacher import distillation_over
from veneer.training.threads import worthwhile_threads

FILE = "reference.npy"


def criteria_over(
    objective: Objective,
    splits: Mapping[str, Sequence[Example]],
    model: PreTrainedModel,
    forward: Forward,
    *,
    identity: Mapping[str, Any],
    world: World,
    tokens_per_batch: int,
) -> list[Criterion]:
    """Return an objective over the examples of each split of a run's rows, which are measured by
    its reference or its teacher where it has one. identity: of the run. The model is as the run
    starts."""
    if objective.teacher is not None:
        return distillation_over(
            *(objective, splits, model), identity=identity, tokens_per_batch=tokens_per_batch
        )
    with worthwhile_threads(model):
        return [
            _criterion_over(
                *(objective, examples, model, forward),
                identity={"split": split, **identity},
                world=world,
                tokens_per_batch=tokens_per_batch,
            )
            for split, examples in splits.items()
        ]


def _criterion_over(
    objective: Objective,
    examples: Sequence[Example],
    model: PreTrainedModel,
    forward: Forward,
    *,
    identity: Mapping[str, Any],
    world: World,
    tokens_per_batch: int,
) -> Criterion:
    if not objective.has_reference:
        return criterion_of(objective, examples)
    of_base = objective.reference == "base"
    place = place_of(identity, FILE, "reference") if of_base and "base" in identity else None
    shape = (len(examples), 2)
    values = world.first(lambda: _read(place, shape))
    if values is None:
        with base_alone(model) if of_base else nullcontext():
            values = log_probabilities(
                model, examples, forward, world=world, tokens_per_batch=tokens_per_batch
            )
        world.first(lambda: _write(place, values))
    return criterion_of(objective, examples, values)


def preference_of(criterion: Criterion) -> str | None:
    """Say what the reference of a criterion over pairs prefers; None where there is none."""
    if not isinstance(criterion, Pairs) or criterion.reference is None:
        return None
    chosen, rejected = criterion.reference.T
    agrees, lead = int((chosen > rejected).sum()), float((chosen - rejected).mean())
    more = "more" if lead >= 0 else "less"
    return (
        f"The reference gives the chosen answer the higher probability in {agrees:,} of "
        f"{len(chosen):,} pairs; in the mean, its logarithm is {abs(lead):.3g} {more} than that of "
        "the rejected one."
    )


def log_probabilities(
    model: PreTrainedModel,
    examples: Sequence[Example],
    forward: Forward,
    *,
    world: World,
    tokens_per_batch: int,
) -> LogProbabilities:
    """Return what the model gives the label tokens of both rows of each example, (examples, 2)."""
    order = StepOrder(
        lengths_of(examples),
        tokens_per_batch * world.size,
        tokens_per_batch,
        0,
        virtual_input_count(model),
    )
    values = torch.zeros(len(examples), 2)

    def own() -> float:
        for step in order.epoch(0):
            for indices in order.deal(step, world.size)[world.rank]:
                batch = pack(examples, indices or idle_rows(step))
                log_p, _ = rows_of(forward.losses(model, batch), batch)
                if indices:
                    values[batch.rows[::2]] = log_p.view(-1, 2).float().cpu()
        return 0.0

    with torch.no_grad(), evaluating(model), forward.installed(model):
        world.total(own, exchanges=forward.exchanges(model))
    world.add_up(values)
    return values.numpy()


def _read(place: Path | None, shape: tuple[int, int]) -> LogProbabilities | None:
    """Return what is kept, None where nothing is, or nothing whole."""
    if place is None:
        return None
    with suppress(OSError, ValueError, EOFError):
        values = np.load(place, allow_pickle=False)
        if values.shape == shape and values.dtype == np.float32:
            cache.note_use(place.parent)
            return values
    return None


def _write(place: Path | None, values: LogProbabilities) -> None:
    """Keep the numbers, unless the disk does not take them: they can be computed again."""
    if place is None:
        return
    with suppress(OSError):
        cache.prune(place.parent.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        with new_file(place) as temporary, temporary.open("wb") as file:
            np.save(file, values, allow_pickle=False)
        cache.note_use(place.parent)
