"""Attention with a full matrix of scores: the formula, for one sequence."""

import torch
from torch import Tensor

from veneer.kernels.attention import Attention


def dense_attention(
    q: Tensor,  # (heads, length, dim)
    k: Tensor,  # (kv_heads, length, dim)
    v: Tensor,  # (kv_heads, length, value_dim)
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (heads,)
) -> Tensor:
    """Return softmax(t) v, (length, heads, value_dim), with t = scale · q kᵀ, or softcap · tanh(t /
    softcap), of the keys that a query sees, and a sink beside them that has no value."""
    shared = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(shared, 0) for x in (k, v))
    t = scale * (q @ k.transpose(1, 2))
    if softcap is not None:
        t = softcap * torch.tanh(t / softcap)
    at = torch.arange(q.shape[1])
    distance = at[:, None] - at
    visible = (distance >= 0) & (distance < (window or len(at)))
    t = t.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        t = torch.cat([t, sinks[:, None, None].expand(-1, len(at), 1)], dim=2)
    return (t.softmax(2)[..., : len(at)] @ v).transpose(0, 1)


def score_mask(attention: Attention, q: Tensor, k: Tensor) -> Tensor:
    """Return which probabilities stay, (queries, heads, keys): keys' values that tell them apart
    show it. Those of keys that are not seen are 0."""
    tokens, key_heads = k.shape[:2]
    values = torch.eye(tokens, dtype=q.dtype)[:, None].expand(-1, key_heads, -1)
    return (attention.forward(q, k, values)[0] != 0).to(q.dtype)
