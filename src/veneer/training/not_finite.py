"""Where numbers that are not finite come from: weights, the optimizer's state, or single rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.data.encode import Example
from veneer.data.packing import pack
from veneer.errors import listed
from veneer.fused.forward import Forward
from veneer.models.fingerprint import base_parameters
from veneer.training.frozen import quantized_tensors
from veneer.training.optimizer import FlatAdamW

MOST_ROWS = 256  # that are computed one by one, for a run that ends anyway


def in_base(model: PreTrainedModel) -> list[str]:
    """Return the base's frozen weights with numbers that are not finite, by name; of quantized ones
    those with such scales."""
    frozen = {n: w for n, w in base_parameters(model).items() if not w.requires_grad}
    return _not_finite({**frozen, **dict(quantized_tensors(model))})


def in_state(weights: Mapping[str, Tensor], optimizer: FlatAdamW) -> list[str]:
    """Return what trains, and what the optimizer holds of it, with numbers that are not finite."""
    return _not_finite({**weights, **optimizer.state()})


def in_rows(
    model: PreTrainedModel,
    forward: Forward,
    examples: Sequence[Example],
    rows: Sequence[int],
    optimizer: FlatAdamW,
) -> list[str]:
    """Return what is not finite where each row is computed by itself, in words."""
    return list(_in_rows(model, forward, examples, rows[:MOST_ROWS], optimizer))


def _in_rows(
    model: PreTrainedModel,
    forward: Forward,
    examples: Sequence[Example],
    rows: Sequence[int],
    optimizer: FlatAdamW,
) -> Iterator[str]:
    for row in rows:
        losses = forward.losses(model, pack(examples, [row]))
        if not bool(losses.isfinite().all()):
            yield f"the loss of {examples[row].where} by itself"
            continue
        optimizer.begin()
        losses.sum().backward()
        gradients = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
        names = _not_finite(gradients)
        optimizer.forget()
        if names:
            yield f"the gradient of {examples[row].where} by itself, in {listed(names)}"


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
        and not tensor.is_meta
        and tensor.untyped_storage().nbytes()
        and not bool(torch.isfinite(tensor).all())
    ]
