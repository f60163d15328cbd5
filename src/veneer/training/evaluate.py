"""The loss on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from veneer.adapter.virtual_forward import virtual_input_count
from veneer.data.encode import Example
from veneer.data.packing import StepOrder, pack
from veneer.fused.forward import Forward
from veneer.models.evaluating import evaluating


def evaluate(
    model: PreTrainedModel,
    examples: Sequence[Example],
    forward: Forward,
    *,
    tokens_per_batch: int = 2048,
) -> float:
    """Return the mean loss over the label tokens of all examples, in nats."""
    lengths = [len(example.tokens) for example in examples]
    order = StepOrder(lengths, tokens_per_batch, tokens_per_batch, 0, virtual_input_count(model))
    total, labels = 0.0, 0
    with torch.no_grad(), evaluating(model), forward.installed(model):
        for step in order.epoch(0):
            for indices in step:
                batch = pack(examples, indices)
                total += float(forward(model, batch))
                labels += int((batch.labels >= 0).sum())
    return total / labels
