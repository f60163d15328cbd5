"""Attention as a card computes it: as each sequence alone, with what its kernels promise."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.dense_attention import dense_attention
from support.flash_by_formula import CARD, attends_as_on_a_card  # noqa: F401
from veneer.kernels import choice, flex
from veneer.kernels.attention import Attention, packed_attention
from veneer.kernels.packing import Packing

LENGTHS = [7, 1, 12, 3]
SHAPES = {"equal": (4, 4, 16, 16), "shared": (4, 2, 16, 16), "odd": (4, 1, 5, 3)}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 4},
    "wide window": {"window": 12},
    "sinks": {"sinks": True},
    "window and sinks": {"window": 3, "sinks": True},
}


def inputs(shape: str, kind: str, dtype: torch.dtype) -> tuple[list[Tensor], Attention]:
    torch.manual_seed(0)
    heads, key_heads, dim, value_dim = SHAPES[shape]
    sizes = (heads, dim), (key_heads, dim), (key_heads, value_dim)
    leaves = [torch.randn(sum(LENGTHS), *size).to(dtype).requires_grad_() for size in sizes]
    sinks = torch.randn(heads) if KINDS[kind].get("sinks") else None
    packing = Packing(LENGTHS)
    return leaves, Attention(packing, 0.3, KINDS[kind].get("window"), sinks=sinks)


def dense(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return each sequence's own attention, one after the other."""
    sequences = zip(*(x.transpose(0, 1).split(LENGTHS, 1) for x in (q, k, v)), strict=True)
    sinks = None if attention.sinks is None else attention.sinks.to(q.dtype)
    settings = (attention.scale, attention.window, attention.softcap, sinks)
    return torch.cat([dense_attention(*qkv, *settings) for qkv in sequences])


@pytest.mark.usefixtures("attends_as_on_a_card")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_flash_attention_takes_the_rows_as_they_lie(shape, kind):
    leaves, attention = inputs(shape, kind, torch.float64)
    assert attention._way(leaves[0], leaves[2]) == "varlen"
    y, kept = attention.forward(*(x.detach() for x in leaves))
    expected = dense(attention, *leaves)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    gradients = attention.backward(dy, *(x.detach() for x in leaves), y, kept)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves, dy))


@pytest.mark.usefixtures("attends_as_on_a_card")
def test_transformers_attention_takes_the_same_way():
    leaves, attention = inputs("shared", "plain", torch.float64)
    heads = [x.transpose(0, 1)[None] for x in leaves]
    y, _ = packed_attention(nn.Identity(), *heads, None, packing=attention.packing, scaling=0.3)
    expected = dense(attention, *leaves)
    torch.testing.assert_close(y[0], expected)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(y[0], leaves, dy), torch.autograd.grad(expected, leaves, dy)
    )


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("shape", ["equal", "shared"])
@pytest.mark.thinned
def test_flex_attention_caps_scores(shape, window, has_sinks):
    leaves, attention = inputs(shape, "sinks" if has_sinks else "plain", torch.float64)
    q, k, v = (x.detach() for x in leaves)
    mask = attention.packing.block_mask(window)
    assert attention.packing.block_mask(window) is mask  # of all layers
    sinks = attention.sinks
    y = flex.flex_attention(q, k, v, mask, 0.3, softcap=2.0, sinks=sinks)
    same = Attention(attention.packing, 0.3, window, 2.0, sinks)
    torch.testing.assert_close(y, dense(same, q, k, v))


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300, 1000])
@pytest.mark.parametrize("lengths", [[640], [1], [129], [100, 28, 300, 5, 400], [384, 128, 127]])
def test_blocks_of_a_mask_are_torchs_without_the_whole_mask(lengths, window):
    packing = Packing(lengths)
    ours = packing.block_mask(window)
    peer = flex.flex.create_block_mask(ours.mask_mod, None, None, *ours.seq_lengths, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(peer, name)), name
    assert torch.equal(ours.to_dense(), peer.to_dense())
    for count, own, theirs in (
        ("kv_num_blocks", ours.kv_indices, peer.kv_indices),
        ("full_kv_num_blocks", ours.full_kv_indices, peer.full_kv_indices),
    ):
        for row, n in enumerate(getattr(ours, count).flatten().tolist()):
            assert own[0, 0, row, :n].tolist() == theirs[0, 0, row, :n].tolist()


def test_soft_caps_choose_flex_attention(monkeypatch):
    card = choice.Device("cuda", (8, 9), flash=True, triton=True)
    monkeypatch.setattr(choice, "device_of", lambda device: card)
    leaves, attention = inputs("shared", "plain", torch.bfloat16)
    q, k, v = (x.detach() for x in leaves)
    capped = Attention(attention.packing, 0.3, None, 2.0)
    assert capped._way(q, v) == "flex"
    y, kept = capped.forward(q, k, v)
    assert not kept  # the backward pass computes it again
    groups = Attention(Packing(LENGTHS, before=[0] * len(LENGTHS)), 0.3, None, 2.0)
    assert groups._way(q, v) == "groups"
    peer, exact = groups.composed(q, k, v), dense(capped, *(x.double() for x in (q, k, v)))
    assert (y - exact).norm() <= 2 * (peer - exact).norm()
