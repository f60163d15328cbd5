"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016), forward and backward, one pass
each."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from veneer.kernels import choice
from veneer.kernels.native import kernel


@dataclass(frozen=True)
class Norm:
    """y = (offset + w) ∘ x̂ + b with x̂ = (x − mean(x)) / σ over the last dimension, all frozen.

    σ² = mean((x − mean(x))²) + eps. Unless `centred`, as in LayerNorm, the mean counts as 0, as in
    RMSNorm. offset: 1 in Gemma, whose weights are stored around 0. rounds: x̂ is rounded to x's
    dtype before the product with w, as in LLaMA.
    """

    weight: Tensor | None  # (dim,), or None for 1
    _: KW_ONLY
    bias: Tensor | None = None  # (dim,), or None for 0
    eps: float
    offset: float = 0.0
    centred: bool = False
    rounds: bool = False

    @property
    def trains(self) -> bool:
        """Whether its weight or bias has a gradient, which `backward` does not return."""
        return any(w is not None and w.requires_grad for w in (self.weight, self.bias))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y, shaped as x (..., dim), and each row's mean (0 unless centred) and 1 / σ, as
        (rows, 2) in float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        native = kernel("norm", x, self.weight, self.bias)
        way = self._way(x)
        if way == "liger":
            from veneer.kernels import liger_norm

            assert self.weight is not None
            y, rstd = liger_norm.forward(x, self.weight, self.eps, self.offset, rounds=self.rounds)
            return y, torch.stack([torch.zeros_like(rstd), rstd], 1)
        if way == "layer_norm":
            y, *two = torch.native_layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
            return y, torch.cat([own.view(-1, 1) for own in two], 1)
        if native is None:
            hat = x.to(wide)
            mean = hat.mean(-1, keepdim=True) if self.centred else torch.zeros_like(hat[..., :1])
            hat = hat - mean
            rstd = torch.rsqrt(hat.square().mean(-1, keepdim=True) + self.eps)
            hat = hat * rstd
            y = self._scaled(hat.to(x.dtype).to(wide) if self.rounds else hat)
            y = y if self.bias is None else y + self.bias.to(wide)
            return y.to(x.dtype), torch.cat([mean, rstd], -1).view(-1, 2)
        x = x.contiguous()
        dim = x.shape[-1]
        rows = x.numel() // dim
        y, statistics = torch.empty_like(x), torch.empty(rows, 2, dtype=wide)
        weight, offset = self._weight_of(x)
        settings = (offset, float(self.eps), self.centred, self.rounds)
        native(x, weight, self.bias, *settings, y, statistics, rows, dim)
        return y, statistics

    def backward(
        self, dy: Tensor, x: Tensor, statistics: Tensor, residual: Tensor | None
    ) -> Tensor:
        """Return the gradient of x, shaped as x, with `residual` added to it: the gradient of x
        from what else uses it. statistics: as `forward` returned them."""
        native = kernel("norm_backward", x, dy, self.weight, residual)
        way = self._way(x)
        if way == "liger":
            from veneer.kernels import liger_norm

            assert self.weight is not None
            rstd = statistics[:, 1].contiguous()
            return liger_norm.backward(
                dy, x, self.weight, rstd, residual, self.offset, rounds=self.rounds
            )
        if way == "layer_norm":
            each = (own.reshape(*x.shape[:-1], 1) for own in statistics.T.contiguous())
            weights = (self.weight, self.bias, [True, False, False])  # a gradient of x alone
            dx: Tensor = torch.ops.aten.native_layer_norm_backward(
                dy, x, x.shape[-1:], *each, *weights
            )[0]
            return dx if residual is None else residual + dx
        if native is None:
            mean, rstd = statistics.view(*x.shape[:-1], 2).split(1, -1)
            hat = (x.to(statistics.dtype) - mean) * rstd
            g = self._scaled(dy.to(statistics.dtype))
            dx = g - hat * (g * hat).mean(-1, keepdim=True)
            dx = rstd * (dx - g.mean(-1, keepdim=True) if self.centred else dx)
            return (dx if residual is None else residual + dx).to(x.dtype)
        x = x.contiguous()
        dim, dx = x.shape[-1], torch.empty_like(x)
        residual = None if residual is None else residual.contiguous()
        weight, offset = self._weight_of(x)
        inputs = (dy.contiguous(), x, weight, statistics, residual)
        native(*inputs, offset, self.centred, dx, x.numel() // dim, dim)
        return dx

    def _way(self, x: Tensor) -> choice.NormWay:
        like = all(w is None or w.dtype == x.dtype for w in (self.weight, self.bias))
        if self.centred:
            plain = like and not self.offset and not self.rounds
        else:
            plain = like and self.weight is not None and self.bias is None
        device = choice.device_of(x.device)
        return choice.norm(device, x.dtype, centred=self.centred, plain=plain)

    def _weight_of(self, x: Tensor) -> tuple[Tensor, float]:
        """Return w and offset; w = 0 and offset = 1 where there is no weight."""
        if self.weight is None:
            return x.new_zeros(x.shape[-1]), 1.0
        return self.weight, float(self.offset)

    def _scaled(self, hat: Tensor) -> Tensor:
        """Return (offset + w) ∘ x̂."""
        return hat if self.weight is None else hat * (self.offset + self.weight.to(hat.dtype))
