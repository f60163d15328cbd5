"""torch's flash kernel for sequences of any lengths, which only cards have, by its formula."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from veneer.kernels import choice

CARD = choice.Device("cuda", (9, 0), flash=True)


@contextmanager
def flash_by_formula() -> Iterator[None]:
    """Compute aten's flash operations on the CPU while the context lasts."""
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", _forward, "CPU")
        library.impl("_flash_attention_backward", _backward, "CPU")
        yield
    finally:
        library._destroy()


@pytest.fixture
def attends_as_on_a_card(monkeypatch) -> Iterator[None]:
    """Let attention choose and compute as on a card, in any dtype."""
    monkeypatch.setattr(choice, "device_of", lambda device: CARD)
    monkeypatch.setattr(choice, "HALVES", (torch.float64, torch.bfloat16))
    with flash_by_formula():
        yield


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    most_queries: int,
    most_keys: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
    **_others: object,
) -> tuple[Tensor, ...]:
    assert not dropout
    assert q_starts.dtype == k_starts.dtype == torch.int32
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0
    t = _scores(q, k, q_starts, scale, is_causal, window_size_left, window_size_right)
    y = torch.einsum("hqk,khd->qhd", t.softmax(2), _by_heads(v, q).to(t.dtype)).to(q.dtype)
    random = torch.zeros(2, dtype=torch.uint64)
    return y, t.logsumexp(2), random, random, q.new_empty(0)


def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    log_sums: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    most_queries: int,
    most_keys: int,
    dropout: float,
    is_causal: bool,
    random: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, ...]:
    """The kernel's own steps: p = exp(t − log_sums), ds = p ∘ (dp − Σ dy ∘ y)."""
    t = _scores(q, k, q_starts, scale, is_causal, window_size_left, window_size_right)
    p = (t - log_sums[..., None]).exp()  # (heads, queries, keys)
    wide_dy, wide_v = dy.to(t.dtype), _by_heads(v, q).to(t.dtype)
    delta = (wide_dy * y.to(t.dtype)).sum(-1).T  # (heads, queries)
    ds = scale * p * (torch.einsum("qhd,khd->hqk", wide_dy, wide_v) - delta[..., None])
    dq = torch.einsum("hqk,khd->qhd", ds, _by_heads(k, q).to(t.dtype))
    dk = torch.einsum("hqk,qhd->khd", ds, q.to(t.dtype))
    dv = torch.einsum("hqk,qhd->khd", p, wide_dy)
    dk, dv = (d.unflatten(1, (k.shape[1], -1)).sum(2) for d in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _by_heads(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _scores(
    q: Tensor, k: Tensor, starts: Tensor, scale: float, is_causal: bool, left: int, right: int
) -> Tensor:
    """Return scale · q kᵀ (heads, queries, keys), −∞ for keys of other sequences and of no
    window: −1 is one without an end, and causal means that none is on the right."""
    at = torch.arange(len(q))
    sequence = torch.searchsorted(starts, at, right=True)
    distance = at[:, None] - at
    visible = sequence[:, None] == sequence
    right = 0 if is_causal else right
    if left >= 0:
        visible &= distance <= left
    if right >= 0:
        visible &= -distance <= right
    wide = torch.promote_types(q.dtype, torch.float32)
    t = scale * torch.einsum("qhd,khd->hqk", q.to(wide), _by_heads(k, q).to(wide))
    return t.masked_fill(~visible, -torch.inf)
