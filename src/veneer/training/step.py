"""One optimizer step, which the processes of a run make together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.data.encode import Example
from veneer.data.packing import Batch, StepOrder, idle_rows, pack
from veneer.fused.forward import Forward
from veneer.kernels.transfer import OnTheWay, has_queue
from veneer.processes.world import World
from veneer.training.optimizer import FlatAdamW
from veneer.training.recorded import RecordedPasses


@dataclass(frozen=True)
class Learnt:
    """What a step learnt from, in all processes: the sum of the losses of its label tokens, how
    many these were, and whether loss and gradient were finite, so that the weights changed."""

    loss: float
    label_tokens: int
    finite: bool


@dataclass(frozen=True, eq=False)
class Learning:
    """A step that the device has been given and may still be computing."""

    label_tokens: int
    _loss_and_finite: OnTheWay

    def wait(self) -> Learnt:
        """Return what it learnt, once that is known."""
        loss, finite = map(float, self._loss_and_finite.arrived())
        return Learnt(loss, self.label_tokens, bool(finite))


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
    passes: RecordedPasses | None = None,
) -> Learning:
    """Learn from the rows of a step, which the processes share, unless the loss or its gradient is
    not finite.

    The loss is the mean over the label tokens of all processes. Between them go a few numbers, and
    once the gradient of what trains. passes: what makes them instead of `forward`, in one process
    alone. Nothing here waits for a device with a queue of its own.
    """
    share = 1 if forward.context is None else forward.context.size  # processes with the same rows
    dealt = order.deal(step, world.size // share)[world.rank // share]
    batches: list[Batch] = []

    def read() -> int:
        batches.extend(pack(examples, indices or idle_rows(step)) for indices in dealt)
        counted = zip(batches, dealt, strict=True)
        return sum(int((batch.labels >= 0).sum()) for batch, indices in counted if indices)

    labels = int(world.total(read)) // share

    def own_loss() -> Tensor:
        total = no_loss(model)
        for batch, indices in zip(batches, dealt, strict=True):
            if passes is not None:
                total += passes(batch, labels)
                continue
            loss = forward(model, batch)
            loss = loss if indices else 0 * loss
            total += loss.detach()
            (loss / labels).backward()
        return total

    optimizer.begin()
    total = total_over(world, own_loss, exchanges=forward.exchanges(model))
    finite = optimizer.step(lr=lr, clip=clip, world=world, only_if=total.isfinite())
    return Learning(labels, OnTheWay(total, finite))


def no_loss(model: PreTrainedModel) -> Tensor:
    """Return a sum of losses to add to, on the model's device, as wide as Python's floats."""
    device = model.device
    wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no wider one
    return torch.zeros((), dtype=wide, device=device)


def total_over(world: World, work: Callable[[], Tensor], *, exchanges: bool) -> Tensor:
    """Return what `World.total` does, of scalars on a device, which is not waited for."""
    if world.size == 1:
        return work()
    own: list[Tensor] = []

    def on_host() -> float:
        own.append(work())
        return 0.0 if has_queue(own[0].device) else float(own[0])

    total = world.total(on_host, exchanges=exchanges)
    if not has_queue(own[0].device):
        return own[0].new_tensor(total)
    world.add_up(own[0])
    return own[0]


def seed_of(*numbers: int) -> int:
    """Return one seed for torch's generator of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
