"""Attention over packed rows as they lie, by torch's flash kernel for sequences of any lengths.

The operations are those of `torch.nn.attention.varlen` (Dao 2023, FlashAttention-2), called one by
one: the fused halves of a layer keep what their backward passes need themselves. They take 16 bits,
heads of up to 256 numbers in multiples of 8, fewer key heads than heads, and windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_STEP = 8  # heads are padded to a multiple of it
# Heads wider than the first are computed as the second in any case; on some cards the kernel takes
# only that (sdp_utils.cpp).
WIDE_HEAD, WIDEST_HEAD = 192, 256


@dataclass(frozen=True)
class VarlenAttention:
    """softmax(scale · q kᵀ) v within each sequence, where a query sees the keys up to its own, and
    of those the last `window`.

    starts (sequences + 1,), int32, on the device: where the sequences begin, and where the last one
    ends. longest: the tokens of the longest. q (tokens, heads, dim), k and v (tokens, kv_heads,
    dim); v's dim may be another.
    """

    starts: Tensor
    longest: int
    scale: float
    window: int | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return y (tokens, heads, value_dim), and log Σ exp of the scores, (heads, tokens)."""
        dim = _dim_of(q, v)
        y, log_sums, *_ = torch.ops.aten._flash_attention_forward(
            *(_padded(x, dim) for x in (q, k, v)),
            *(self.starts, self.starts, self.longest, self.longest),
            0.0,
            self.window is None,
            return_debug_mask=False,
            **self._settings,
        )
        return y[..., : v.shape[-1]], log_sums

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, log_sums: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v.

        Probabilities are exp(scores − log_sums), so that a log Σ exp with a sink in it, and the y
        that belongs to it, give the gradients of attention with the sink.
        """
        dim = _dim_of(q, v)
        random = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that is 0
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *(_padded(x, dim) for x in (dy, q, k, v, y)),
            log_sums,
            *(self.starts, self.starts, self.longest, self.longest),
            0.0,
            self.window is None,
            random,
            torch.empty(0, device=q.device),
            **self._settings,
        )
        return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]

    @property
    def _settings(self) -> dict[str, float | int]:
        left = -1 if self.window is None else self.window - 1  # keys before a query's own
        return {"scale": self.scale, "window_size_left": left, "window_size_right": 0}


def _dim_of(q: Tensor, v: Tensor) -> int:
    """Return the dim to which q, k and v are padded: the kernel wants one for all."""
    dim = max(q.shape[-1], v.shape[-1])
    return WIDEST_HEAD if dim > WIDE_HEAD else -(dim // -LEAST_STEP) * LEAST_STEP


def _padded(x: Tensor, dim: int) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))
