"""Rotations by the angles of a model's own code."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.fused.structure import Turn
from veneer.kernels.rotary import Rotary

# cos and sin, (1, tokens, turning dims), or both as complex numbers, one for each pair.
Angles = tuple[Tensor, Tensor] | Tensor


class Rotaries:
    """The rotations of one pass, each made once: most layers share the same angles."""

    def __init__(self) -> None:
        # By turn, dtype and the identity of cos, which is kept alive here.
        self._made: dict[tuple[Turn, torch.dtype, int], tuple[Angles, Rotary | None]] = {}

    def rotary(self, turn: Turn, angles: Angles | None, dtype: torch.dtype) -> Rotary | None:
        """Return what `rotary_of` does."""
        if angles is None:
            return None
        key = turn, dtype, id(angles if isinstance(angles, Tensor) else angles[0])
        if key not in self._made:
            self._made[key] = angles, rotary_of(turn, angles, dtype)
        return self._made[key][1]

    def forget(self) -> None:
        """Free all rotations that no layer keeps."""
        self._made.clear()


def rotary_of(turn: Turn, angles: Angles | None, dtype: torch.dtype) -> Rotary | None:
    """Return the rotation by cos and sin as a model's own code has them, or None where nothing
    turns."""
    if turn == "none" or angles is None:
        return None
    is_complex = isinstance(angles, Tensor)
    cos, sin = (angles.real, angles.imag) if isinstance(angles, Tensor) else angles
    cos, sin = (x[0].to(dtype) for x in (cos, sin))  # (tokens, pairs or 2 · pairs)
    if turn == "pairs, angles twice":
        cos, sin = cos[:, ::2], sin[:, ::2]
    elif turn != "halves, angles once" and not is_complex:
        pairs = cos.shape[1] // 2
        cos, sin = cos[:, :pairs], sin[:, :pairs]
    return Rotary(cos.contiguous(), sin.contiguous(), interleaved=turn.startswith("pairs"))
