"""The loss on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapter.virtual_forward import virtual_input_count
from veneer.data.columns import lengths_of
from veneer.data.encode import Example
from veneer.data.packing import StepOrder, idle_rows, pack
from veneer.fused.forward import Forward
from veneer.models.evaluating import evaluating
from veneer.processes.world import World
from veneer.training.step import no_loss, total_over


def evaluate(
    model: PreTrainedModel,
    examples: Sequence[Example],
    forward: Forward,
    *,
    tokens_per_batch: int = 2048,
    world: World | None = None,
) -> float:
    """Return the mean loss over the label tokens of all examples, in nats.

    world: the processes that share the examples, each with a model like the others'; this one alone
    unless given.
    """
    world = world or World()
    share = 1 if forward.context is None else forward.context.size  # processes with the same rows
    groups = world.size // share
    lengths = lengths_of(examples)
    order = StepOrder(
        lengths, tokens_per_batch * groups, tokens_per_batch, 0, virtual_input_count(model)
    )
    labels = 0

    def own_loss() -> Tensor:
        nonlocal labels
        total = no_loss(model)
        for step in order.epoch(0):
            for indices in order.deal(step, groups)[world.rank // share]:
                batch = pack(examples, indices or idle_rows(step))
                loss = forward(model, batch)
                if indices:
                    total += loss
                    labels += int((batch.labels >= 0).sum())
        return total

    with torch.no_grad(), evaluating(model), forward.installed(model):
        total = float(total_over(world, own_loss, exchanges=forward.exchanges(model)))
    return total / (world.sums(labels)[0] / share)
