"""LoRA over a convolution: A is one with the same window, B combines its channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.adapter.layers import AdaptedLayer
from veneer.kernels.gain import apply_gain
from veneer.lowrank.formula import new_A


class LoRAConv2d(AdaptedLayer):
    """Return gain ∘ (W * x + Σ scaling · B (A * x)) + b, where * convolves.

    As W, the weight is (out, in · height · width): one row for each output channel. A has
    (rank, in · height · width) and B (out, rank).
    """

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def stored(self, weight: Tensor) -> Tensor:
        return weight.view(self.original.weight.shape)  # type: ignore[arg-type]

    def base_weight_times(self, A: Tensor) -> Tensor:
        W = self.dense_base_weight
        return W @ A.to(W.dtype).T

    def add(self, name: str, config: LoRA, path: str, generator: torch.Generator | None) -> None:
        out, in_ = self.base_weight.shape
        rank = config.rank_of(path)
        A, B = new_A(rank, in_, config.init, generator), torch.zeros(out, rank)
        adapter = Adapter(A, B, scaling=config.scaling_of(path), dropout=config.dropout)
        adapter.lora_A.requires_grad_(not config.lora_fa)
        self._attach_fresh(name, adapter, config)

    def forward(self, x: Tensor) -> Tensor:
        conv: Any = self.original
        active = self.active()
        if not active:
            return conv(x)
        bias = self.active_bias(active)
        y = conv._conv_forward(x, conv.weight, bias)  # (rows, out, height, width)
        update = self.low_rank_update(active, x.dtype)
        ranks = [adapter.rank for adapter, _ in active]
        factors = zip(active, update.A.split(ranks), update.B.split(ranks, 1), strict=True)
        for (adapter, _), A, B in factors:
            window = A.unflatten(1, conv.weight.shape[1:])  # (rank, in, height, width)
            dropped = F.dropout(x, adapter.dropout, self.training)
            h = F.conv2d(dropped, window, None, conv.stride, conv.padding)
            y = y + F.conv2d(h, B[:, :, None, None])
        if update.gain is not None:
            by_channel = None if bias is None else bias[:, None, None]
            y = apply_gain(y, update.gain[:, None, None], by_channel)
        return y.to(x.dtype)


def why_not_adaptable(conv: nn.Conv2d) -> str | None:
    """Return why B (A * x) would be no change of this convolution's weight, or None if it is."""
    if conv.groups != 1:
        return f"it has {conv.groups} groups"
    if conv.dilation != (1, 1):
        return f"its dilation is {conv.dilation}"
    if conv.padding_mode != "zeros":
        return f"it pads by {conv.padding_mode!r}"
    return None
