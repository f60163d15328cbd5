"""The loss on held-out rows, and what their objective measures beside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapter.virtual_forward import virtual_input_count
from veneer.data.columns import lengths_of
from veneer.data.encode import Example
from veneer.data.packing import StepOrder, idle_rows, pack
from veneer.fused.forward import Forward
from veneer.models.evaluating import evaluating
from veneer.objectives.criterion import MEAN_LOSS, Criterion
from veneer.processes.world import World
from veneer.training.step import add_outcome, counts_of, means, no_sums, sums_over


@dataclass(frozen=True)
class Measurement:
    """The mean loss over whatever the criterion divides by, and what is measured beside.
    perplexity: where that is the loss of tokens."""

    loss: float
    metrics: Mapping[str, float]
    perplexity: float | None = None


def evaluate(
    model: PreTrainedModel,
    examples: Sequence[Example],
    forward: Forward,
    *,
    tokens_per_batch: int = 2048,
    world: World | None = None,
) -> float:
    """Return the mean loss over the label tokens of all examples, in nats, as `measure` does."""
    return measure(model, examples, forward, tokens_per_batch=tokens_per_batch, world=world).loss


def measure(
    model: PreTrainedModel,
    examples: Sequence[Example],
    forward: Forward,
    *,
    criterion: Criterion = MEAN_LOSS,
    tokens_per_batch: int = 2048,
    world: World | None = None,
) -> Measurement:
    """Return what all examples come to by a criterion that is over them.

    world: the processes that share the examples, each with a model like the others'; this one alone
    unless given.
    """
    world = world or World()
    share = 1 if forward.context is None else forward.context.size  # processes with the same rows
    groups = world.size // share
    order = StepOrder(
        lengths_of(examples),
        tokens_per_batch * groups,
        tokens_per_batch,
        0,
        virtual_input_count(model),
    )
    own = [
        (indices or idle_rows(step), bool(indices))
        for step in order.epoch(0)
        for indices in order.deal(step, groups)[world.rank // share]
    ]

    batches = ((pack(examples, rows), counts) for rows, counts in own)
    of_all = counts_of(criterion, batches, world, share=share)

    def own_sums() -> Tensor:
        sums = no_sums(model, criterion)
        for rows, counts in own:
            batch = pack(examples, rows)
            losses = forward.losses(model, batch, criterion.token_loss(batch, model.device))
            if counts:
                add_outcome(sums, criterion(losses, batch, of_all))
        return sums

    with torch.no_grad(), evaluating(model), forward.installed(model):
        sums = sums_over(world, own_sums, exchanges=forward.exchanges(model)).cpu()
    loss, *measured = means(sums, criterion.divisor(of_all))
    perplexity = math.exp(min(loss, 700.0)) if criterion is MEAN_LOSS else None
    return Measurement(loss, dict(zip(criterion.metrics, measured, strict=True)), perplexity)
