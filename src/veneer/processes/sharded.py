"""Weights that torch's `fully_shard` (FSDP2) holds in pieces, one in each process."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Return whether this process holds a piece only of a model's weights."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the pieces of all processes.

    All processes must ask for the same tensors in the same order; a tensor that is not sharded is
    returned as it is.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
