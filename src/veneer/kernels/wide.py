"""float64, on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return x in float64, on the processor where its device has no such numbers (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)
