"""What torch's own attention keeps for the backward pass, looked at where the plan is made."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

TOKENS, HEAD_DIM = 3, 8  # of a pass that is small, and tells scores from all else by their shape


@cache
def keeps_scores(heads: int, shared_heads: int) -> bool:
    """Return whether torch keeps the scores of attention under a mask, (heads, tokens, tokens).

    Releases differ: 2.13 takes the way that keeps them where heads share one key, 2.15 does not.
    """
    kept: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.device("cpu"), torch.enable_grad():
        q = torch.zeros(1, heads, TOKENS, HEAD_DIM, requires_grad=True)
        k = v = torch.zeros(1, shared_heads, TOKENS, HEAD_DIM)
        mask = torch.zeros(1, 1, TOKENS, TOKENS)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return any(shape.numel() == heads * TOKENS * TOKENS for shape in kept)
