"""One optimizer step, which the processes of a run make together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.data.encode import Example
from veneer.data.packing import Batch, StepOrder, idle_rows, pack
from veneer.fused.forward import Forward
from veneer.kernels.cross_entropy import TokenLoss
from veneer.kernels.transfer import OnTheWay, has_queue
from veneer.objectives.criterion import MEAN_LOSS, Criterion, Outcome, StepCounts
from veneer.processes.world import ALONE, World
from veneer.training.events import Event
from veneer.training.optimizer import FlatAdamW
from veneer.training.recorded import RecordedPasses


@dataclass(frozen=True)
class Learnt:
    """What a step learnt from, in all processes: its loss, how many label tokens it had, whether
    loss and gradient were finite, so that the weights changed, and what was measured beside."""

    loss: float
    label_tokens: int
    finite: bool
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Learning:
    """A step that the device has been given and may still be computing.

    before: the earlier updates by the same rows, all of which have to be finite too.
    """

    label_tokens: int
    divisor: int
    metrics: Sequence[str]
    _sums_and_finite: OnTheWay
    before: Sequence[Learning] = ()

    def wait(self) -> Learnt:
        """Return what it learnt, once that is known."""
        sums, finite = self._sums_and_finite.arrived()
        loss, *measured = means(sums, self.divisor)
        metrics = dict(zip(self.metrics, measured, strict=True))
        all_finite = bool(finite) and all(earlier.wait().finite for earlier in self.before)
        return Learnt(loss, self.label_tokens, all_finite, metrics)


@dataclass(frozen=True, slots=True, eq=False)
class StepToLearn(Event):
    """What a run asks of whoever computes for it, which then has `learning`: a step of its rows.

    step: batches of indices of `examples`; `order` has made them. clip: the gradient's largest norm
    criterion: what makes the loss, over the same examples
    most: the largest loss from which is learnt
    """

    examples: Sequence[Example]
    step: Sequence[Sequence[int]]
    optimizer: FlatAdamW
    order: StepOrder
    lr: float
    clip: float
    criterion: Criterion = MEAN_LOSS
    most: float = math.inf
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

    batches: those of this process, with whether each counts; an idle one does not. counts: of the
    step, in all processes. sums: of this process so far, its loss and what is measured beside.
    """

    asked: StepToLearn
    batches: Sequence[tuple[Batch, bool]]
    counts: StepCounts
    sums: Tensor

    @classmethod
    def of(
        cls, asked: StepToLearn, model: PreTrainedModel, *, world: World = ALONE, share: int = 1
    ) -> StepUnderWay:
        """Begin a step: its gradients add up from here on. share: processes with the same rows."""
        step, examples = asked.step, asked.examples
        dealt = asked.order.deal(step, world.size // share)[world.rank // share]
        batches: list[tuple[Batch, bool]] = []

        def read() -> Iterator[tuple[Batch, bool]]:
            for indices in dealt:
                batches.append((pack(examples, indices or idle_rows(step)), bool(indices)))
                yield batches[-1]

        counts = counts_of(asked.criterion, read(), world, share=share)
        asked.optimizer.begin()
        return cls(asked, batches, counts, no_sums(model, asked.criterion))

    @property
    def divisor(self) -> int:
        """What its losses are divided by."""
        return self.asked.criterion.divisor(self.counts)

    def token_loss(self, batch: Batch) -> TokenLoss | None:
        """Return what the losses of a batch's label tokens are, −log p unless given."""
        return self.asked.criterion.token_loss(batch, self.sums.device)

    def loss(self, losses: Tensor, batch: Batch) -> Tensor:
        """Return a batch's loss, with its gradient, and count it among the sums. losses (labelled,)
        are those of its label tokens."""
        outcome = self.asked.criterion(losses, batch, self.counts)
        add_outcome(self.sums, outcome)
        return outcome.loss

    def end(self, sums: Tensor, world: World = ALONE) -> None:
        """Let the weights change, unless a loss or the gradient is not finite, or the loss is too
        large. sums: those of all processes."""
        asked = self.asked
        learns = sums[0].isfinite()
        if asked.most < math.inf:
            learns &= sums[0] <= asked.most * self.divisor
        finite = asked.optimizer.step(lr=asked.lr, clip=asked.clip, world=world, only_if=learns)
        names, labels = asked.criterion.metrics, self.counts.labels
        asked.learnt(Learning(labels, self.divisor, names, OnTheWay(sums, finite)))


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

    The loss is the mean over what the step's criterion counts in all processes. Between them go a
    few numbers, and once the gradient of what trains. passes: what makes them instead of `forward`,
    in one process alone, of the mean loss. Nothing here waits for a device with a queue of its own.
    """
    share = 1 if forward.context is None else forward.context.size
    step = StepUnderWay.of(asked, model, world=world, share=share)

    def own_sums() -> Tensor:
        for batch, counts in step.batches:
            if passes is not None:
                step.sums[0] += passes(batch, step.divisor)
                continue
            losses = forward.losses(model, batch, step.token_loss(batch))
            loss = step.loss(losses, batch) if counts else 0 * losses.sum()
            (loss / step.divisor).backward()
        return step.sums

    step.end(sums_over(world, own_sums, exchanges=forward.exchanges(model)), world)


def counts_of(
    criterion: Criterion, batches: Iterable[tuple[Batch, bool]], world: World, *, share: int = 1
) -> StepCounts:
    """Return what the batches of all processes count together. batches: this one's, at least one,
    with whether each counts. share: processes with the same rows."""
    others: list[list[int]] = []

    def read() -> int:
        labels = 0
        for batch, counts in batches:
            labels += counts * int((batch.labels >= 0).sum())
            others.append([counts * number for number in criterion.counts(batch)])
        return labels

    labels = int(world.total(read)) // share
    sums = [sum(numbers) for numbers in zip(*others, strict=True)]
    return StepCounts(labels, tuple(map(int, world.sums(*sums))) if sums else ())


def no_sums(model: PreTrainedModel, criterion: Criterion = MEAN_LOSS) -> Tensor:
    """Return sums of a loss and of what is measured beside to add to, (1 + metrics,), on the
    model's device, as wide as Python's floats."""
    device = model.device
    wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no wider one
    return torch.zeros(1 + len(criterion.metrics), dtype=wide, device=device)


def add_outcome(sums: Tensor, outcome: Outcome) -> None:
    """Add what a criterion makes of a batch."""
    sums[0] += outcome.loss.detach()
    if outcome.metrics is not None:
        sums[1:] += outcome.metrics


def means(sums: Tensor, divisor: int) -> list[float]:
    """Return a loss, and what is measured beside, of their sums on the host."""
    return [float(total) / divisor for total in sums]


def sums_over(world: World, work: Callable[[], Tensor], *, exchanges: bool) -> Tensor:
    """Return what `World.total` does, of numbers on a device, which is not waited for."""
    if world.size == 1:
        return work()
    own: list[Tensor] = []

    def on_host() -> float:
        own.append(work())
        late = len(own[0]) > 1 or has_queue(own[0].device)
        return 0.0 if late else float(own[0])

    total = world.total(on_host, exchanges=exchanges)
    if len(own[0]) == 1 and not has_queue(own[0].device):
        return own[0].new_tensor([total])
    world.add_up(own[0])
    return own[0]


def seed_of(*numbers: int) -> int:
    """Return one seed for torch's generator of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
