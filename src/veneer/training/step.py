"""One optimizer step, which the processes of a run make together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from veneer.data.encode import Example
from veneer.data.packing import Batch, StepOrder, idle_rows, pack
from veneer.fused.forward import Forward
from veneer.processes.world import World
from veneer.training.optimizer import FlatAdamW


@dataclass(frozen=True)
class Learnt:
    """What a step learnt from, in all processes: the sum of the losses of its label tokens, how
    many these were, and whether loss and gradient were finite, so that the weights changed."""

    loss: float
    label_tokens: int
    finite: bool


def learn(
    model: PreTrainedModel,
    forward: Forward,
    optimizer: FlatAdamW,
    examples: Sequence[Example],
    step: Sequence[Sequence[int]],
    *,
    order: StepOrder,
    lr: float,
    clip: float,
    world: World,
) -> Learnt:
    """Learn from the rows of a step, which the processes share, unless the loss or its gradient is
    not finite.

    The loss is the mean over the label tokens of all processes. Between them go a few numbers, and
    once the gradient of what trains.
    """
    share = 1 if forward.context is None else forward.context.size  # processes with the same rows
    dealt = order.deal(step, world.size // share)[world.rank // share]
    batches: list[Batch] = []

    def read() -> int:
        batches.extend(pack(examples, indices or idle_rows(step)) for indices in dealt)
        counted = zip(batches, dealt, strict=True)
        return sum(int((batch.labels >= 0).sum()) for batch, indices in counted if indices)

    labels = int(world.total(read)) // share

    def own_loss() -> float:
        total = 0.0
        for batch, indices in zip(batches, dealt, strict=True):
            loss = forward(model, batch)
            loss = loss if indices else 0 * loss
            total += float(loss.detach())
            (loss / labels).backward()
        return total

    optimizer.begin()
    total = world.total(own_loss, exchanges=forward.exchanges(model))
    finite = math.isfinite(total) and optimizer.step(lr=lr, clip=clip, world=world)
    if not finite:
        optimizer.forget()
    return Learnt(total, labels, finite)


def seed_of(*numbers: int) -> int:
    """Return one seed for torch's generator of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
