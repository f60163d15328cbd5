"""One optimizer step, which the processes of a run make together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.data.encode import Example
from veneer.data.packing import Batch, StepOrder, idle_rows, pack
from veneer.fused.forward import Forward
from veneer.kernels.transfer import OnTheWay, has_queue
from veneer.processes.world import ALONE, World
from veneer.training.events import Event
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


@dataclass(frozen=True, slots=True, eq=False)
class StepToLearn(Event):
    """What a run asks of whoever computes for it, which then has `learning`: a step of its rows.

    step: batches of indices of `examples`; `order` has made them. clip: the gradient's largest norm
    """

    examples: Sequence[Example]
    step: Sequence[Sequence[int]]
    optimizer: FlatAdamW
    order: StepOrder
    lr: float
    clip: float
    _answer: list[Learning] = field(default_factory=list)

    @property
    def learning(self) -> Learning:
        """What was learnt."""
        (learning,) = self._answer
        return learning

    def learnt(self, learning: Learning) -> None:
        """Let the run go on with what was learnt."""
        self._answer.append(learning)


@dataclass(frozen=True, eq=False)
class StepUnderWay:
    """A step whose passes are being made.

    batches: those of this process, with whether each counts; an idle one does not. labels: label
    tokens of the step, in all processes. total: the sum of this process's losses so far.
    """

    asked: StepToLearn
    batches: Sequence[tuple[Batch, bool]]
    labels: int
    total: Tensor

    @classmethod
    def of(
        cls, asked: StepToLearn, model: PreTrainedModel, *, world: World = ALONE, share: int = 1
    ) -> StepUnderWay:
        """Begin a step: its gradients add up from here on. share: processes with the same rows."""
        step, examples = asked.step, asked.examples
        dealt = asked.order.deal(step, world.size // share)[world.rank // share]
        batches: list[tuple[Batch, bool]] = []

        def read() -> int:
            batches.extend(
                (pack(examples, indices or idle_rows(step)), bool(indices)) for indices in dealt
            )
            return sum(int((batch.labels >= 0).sum()) for batch, counts in batches if counts)

        labels = int(world.total(read)) // share
        asked.optimizer.begin()
        return cls(asked, batches, labels, no_loss(model))

    def end(self, total: Tensor, world: World = ALONE) -> None:
        """Let the weights change, unless a loss or the gradient is not finite. total: the sum of
        the losses in all processes."""
        asked = self.asked
        finite = asked.optimizer.step(
            lr=asked.lr, clip=asked.clip, world=world, only_if=total.isfinite()
        )
        asked.learnt(Learning(self.labels, OnTheWay(total, finite)))


def learn(
    model: PreTrainedModel,
    forward: Forward,
    asked: StepToLearn,
    *,
    world: World,
    passes: RecordedPasses | None = None,
) -> None:
    """Learn from the rows of a step, which the processes share, unless the loss or its gradient is
    not finite.

    The loss is the mean over the label tokens of all processes. Between them go a few numbers, and
    once the gradient of what trains. passes: what makes them instead of `forward`, in one process
    alone. Nothing here waits for a device with a queue of its own.
    """
    share = 1 if forward.context is None else forward.context.size
    step = StepUnderWay.of(asked, model, world=world, share=share)

    def own_loss() -> Tensor:
        total = step.total
        for batch, counts in step.batches:
            if passes is not None:
                total += passes(batch, step.labels)
                continue
            loss = forward(model, batch)
            loss = loss if counts else 0 * loss
            total += loss.detach()
            (loss / step.labels).backward()
        return total

    step.end(total_over(world, own_loss, exchanges=forward.exchanges(model)), world)


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
