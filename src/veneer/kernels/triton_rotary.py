"""Rotation of a head's dimensions in one pass, as `kernels.rotary` has the formula.

Liger's turns q and k at once, in place, in halves and over whole heads; here one tensor is turned
at a time, in place or not, in halves or neighbours, and over the first dimensions where the rest
stays as it is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

HEADS = 4  # that one program turns


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool, interleaved: bool
) -> Tensor:
    """Write x (tokens, heads, dim), turned by the angles of cos and sin (tokens, pairs), or by
    their negatives if `back`, to `out`, contiguous, which may be x, and return it."""
    tokens, heads, dim = x.shape
    pairs = cos.shape[1]
    _rotate[(tokens, triton.cdiv(heads, HEADS))](
        *(x, cos, sin, out, x.stride(0), x.stride(1), heads, dim, pairs),
        *(-1.0 if back else 1.0, interleaved, HEADS),
        *(triton.next_power_of_2(pairs), triton.next_power_of_2(max(1, dim - 2 * pairs))),
        dim > 2 * pairs and out.data_ptr() != x.data_ptr(),
    )
    return out


@triton.jit
def _rotate(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    heads: tl.tensor,
    dim: tl.tensor,
    pairs: tl.tensor,
    sign: tl.tensor,
    interleaved: tl.constexpr,
    block_heads: tl.constexpr,
    block_pairs: tl.constexpr,
    block_rest: tl.constexpr,
    copies_rest: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * block_heads + tl.arange(0, block_heads)[:, None]
    pair = tl.arange(0, block_pairs)[None, :]
    inside = (head < heads) & (pair < pairs)
    first = 2 * pair if interleaved else pair
    second = 2 * pair + 1 if interleaved else pair + pairs
    own = x + token * token_stride + head * head_stride
    a = tl.load(own + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(own + second, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * pairs + pair, mask=pair < pairs, other=0.0).to(tl.float32)
    s = tl.load(sin + token * pairs + pair, mask=pair < pairs, other=0.0).to(tl.float32) * sign
    to = out + (token * heads + head) * dim
    tl.store(to + first, a * c - b * s, mask=inside)
    tl.store(to + second, b * c + a * s, mask=inside)
    if copies_rest:
        rest = 2 * pairs + tl.arange(0, block_rest)[None, :]
        left = (head < heads) & (rest < dim)
        tl.store(to + rest, tl.load(own + rest, mask=left), mask=left)
