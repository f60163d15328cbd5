"""Rotary position embedding (Su et al. 2021, RoFormer), on each head or its first dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.kernels import choice
from veneer.kernels.native import adjacent, kernel, strided


@dataclass(frozen=True)
class Rotary:
    """(a, b) → (a cos − b sin, b cos + a sin) for each pair of a head's dimensions.

    cos, sin (tokens, pairs), contiguous: the angles of the tokens' positions. Pair i is dimensions
    i and i + pairs, as in LLaMA, or 2 i and 2 i + 1 if `interleaved`, as in GPT-J. Dimensions from
    2 · pairs on stay as they are.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def rotate(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Return x (tokens, heads, dim) rotated, contiguous; by −angles with `back`, as the
        gradient needs it. x may be a part of longer rows, such as those of q, k and v together."""
        return self._rotate(adjacent(x), x.new_empty(x.shape), back)

    def rotate_(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Rotate x (tokens, heads, dim), contiguous, in place, and return it."""
        return self._rotate(x, x, back)

    def _rotate(self, x: Tensor, out: Tensor, back: bool) -> Tensor:
        native = kernel("rotate", x, self.cos, self.sin)
        if native is None and choice.uses_triton(x, self.cos, self.sin):
            from veneer.kernels import triton_rotary

            angles = self.cos, self.sin
            return triton_rotary.rotate(x, *angles, out, back=back, interleaved=self.interleaved)
        if native is None:
            return out.copy_(self._rotated(x, -self.sin if back else self.sin))
        sign, pairs = -1.0 if back else 1.0, self.cos.shape[1]
        settings = (self.cos, self.sin, sign, self.interleaved)
        native(*strided(x), *settings, out, *x.shape, pairs)
        return out

    def _rotated(self, x: Tensor, sin: Tensor) -> Tensor:
        cos, sin = self.cos[:, None], sin[:, None]  # (tokens, 1, pairs)
        pairs = cos.shape[-1]
        turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        dims = turned.unflatten(-1, (pairs, 2) if self.interleaved else (2, pairs))
        axis = -1 if self.interleaved else -2
        a, b = dims.unbind(axis)
        pair = torch.stack([a * cos - b * sin, b * cos + a * sin], axis)
        return torch.cat([pair.flatten(-2), rest], -1)
