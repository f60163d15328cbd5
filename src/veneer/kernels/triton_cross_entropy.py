"""Cross-entropy and its gradient over the logits, read twice, as `kernels.cross_entropy` has the
formula.

Liger's function asks the card how many labels there are and how large they are, which stalls it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.triton_numbers import tanh

COLUMNS = 4096  # of a row that are in registers at a time


def cross_entropy(
    z: Tensor, targets: Tensor, out: Tensor, *, scale: float, softcap: float | None
) -> Tensor:
    """Return −log softmax(y)[target] of each row in float32, and write the gradient of z to `out`,
    which may be z; y = scale · z or softcap · tanh(scale · z / softcap). z, out (rows, vocab)."""
    rows, vocab = z.shape
    losses = torch.empty(rows, dtype=torch.float32, device=z.device)
    columns = min(COLUMNS, triton.next_power_of_2(vocab))
    if rows:
        _cross_entropy[(rows,)](
            *(z, targets, losses, out, z.stride(0), out.stride(0), vocab),
            *(scale, softcap or 1.0, softcap is not None, columns),
        )
    return losses


@triton.jit
def _cross_entropy(
    z: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    out: tl.tensor,
    z_stride: tl.tensor,
    out_stride: tl.tensor,
    vocab: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    is_capped: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    z += row * z_stride
    out += row * out_stride
    # Before the sums, at which all threads meet: afterwards another may have written over it.
    own = _logits(z + target, target < vocab, scale, softcap, is_capped)
    highest = float("-inf")  # of the columns so far, and Σ exp(y − highest) of them
    total = 0.0
    for first in range(0, vocab, block):
        column = first + tl.arange(0, block)
        inside = column < vocab
        y = _logits(z + column, inside, scale, softcap, is_capped)
        y = tl.where(inside, y, float("-inf"))
        highest_here = tl.maximum(highest, tl.max(y, 0))
        total *= tl.exp(highest - highest_here)
        total += tl.sum(tl.exp(y - highest_here), 0)
        highest = highest_here
    log_sum = highest + tl.log(total)
    tl.store(losses + row, log_sum - own)
    for first in range(0, vocab, block):
        column = first + tl.arange(0, block)
        inside = column < vocab
        y = _logits(z + column, inside, scale, softcap, is_capped)
        gradient = tl.exp(y - log_sum) - tl.where(column == target, 1.0, 0.0)
        slope = scale
        if is_capped:
            slope = scale * (1 - (y / softcap) * (y / softcap))
        tl.store(out + column, gradient * slope, mask=inside)


@triton.jit
def _logits(
    z: tl.tensor, inside: tl.tensor, scale: tl.tensor, softcap: tl.tensor, is_capped: tl.constexpr
) -> tl.tensor:
    """Return y."""
    y = tl.load(z, mask=inside, other=0.0).to(tl.float32) * scale
    return softcap * tanh(y / softcap) if is_capped else y
