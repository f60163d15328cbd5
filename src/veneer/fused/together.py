"""One pass over a base for several adapters, each of which learns from rows of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapter.use import acting
from veneer.data.packing import Batch
from veneer.fused.forward import Forward


@dataclass(frozen=True, eq=False)
class AdapterBatch:
    """The rows from which one adapter learns in a pass.

    adapter    the name under which it is attached
    batch      its rows
    labels     what its loss is divided by before the backward pass: the label tokens of its step
    generator  what the masks of its dropout are drawn from, on the CPU; None: torch's own
    """

    adapter: str
    batch: Batch
    labels: int = 1
    generator: torch.Generator | None = None


def losses_together(
    forward: Forward, model: PreTrainedModel, batches: Sequence[AdapterBatch]
) -> Tensor:
    """Return the sum of the label tokens' losses of each batch, (batches,), in float32 and without
    a gradient. The model is in evaluation mode, or in training mode, as it is."""
    with torch.no_grad():
        return torch.stack([_alone(forward, model, each) for each in batches])


def backward_together(
    forward: Forward, model: PreTrainedModel, batches: Sequence[AdapterBatch]
) -> Tensor:
    """Add to the gradients of each adapter those of its batch's loss / labels, and return the sums
    of losses, (batches,), in float32.

    Each adapter's loss and gradients are those of a pass of its own, but for rounding: nothing of
    one batch reaches another, not even a number that is not finite. The names must differ. Which
    adapters act afterwards is what it was before.
    """
    losses = []
    for each in batches:
        loss = _alone(forward, model, each, backward=True)
        losses.append(loss)
    return torch.stack(losses)


def _alone(
    forward: Forward, model: PreTrainedModel, each: AdapterBatch, *, backward: bool = False
) -> Tensor:
    """Return the sum of losses of a batch by a pass of its own."""
    with acting(model, each.adapter), _drawing_from(each.generator):
        loss = forward(model, each.batch)
        if backward:
            (loss / each.labels).backward()
    return loss.detach()


@contextmanager
def _drawing_from(generator: torch.Generator | None) -> Iterator[None]:
    """Let torch's own generator on the CPU be another one while the context lasts."""
    if generator is None:
        yield
        return
    before = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)
