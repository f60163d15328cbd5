"""Dropout of attention's probabilities: the same mask on both ways, and another in each block."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from support.closeness import assert_no_further
from support.dense_attention import dense_attention, score_mask
from veneer.kernels.attention import Attention, packed_attention
from veneer.kernels.dropout import Mask
from veneer.kernels.packing import Packing

LENGTHS, HEADS, KEY_HEADS, DIM = [20, 290, 13], 4, 2, 8
KINDS = list(itertools.product([None, 37], [None, 2.5], [False, True]))


def attention_of(window=None, softcap=None, sinks=None, seed: int = 4) -> Attention:
    return Attention(Packing(LENGTHS), 0.3, window, softcap, sinks, Mask(0.25, seed))


def qkv(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    return [torch.randn(tokens, n, DIM).to(dtype) for n in (HEADS, KEY_HEADS, KEY_HEADS)]


def expected(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return y by probabilities of plain operations and the masks that `attention` has."""
    kept = score_mask(attention, q.detach(), k.detach()) * attention.dropout.scale
    shared, outputs, start = HEADS // KEY_HEADS, [], 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        eye = torch.eye(length, dtype=q.dtype).expand(KEY_HEADS, -1, -1)
        heads = (x[rows].transpose(0, 1) for x in (q, k))
        sinks = None if attention.sinks is None else attention.sinks.to(q.dtype)
        p = dense_attention(
            *heads, eye, attention.scale, attention.window, attention.softcap, sinks
        )
        own = p * kept[rows, :, rows]  # (queries, heads, keys)
        values = v[rows].repeat_interleave(shared, 1)
        outputs.append(torch.einsum("qhk,khd->qhd", own, values))
        start += length
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap", "has_sinks"), KINDS)
@pytest.mark.thinned(pairs=True)
def test_equals_plain_operations_with_the_same_masks(window, softcap, has_sinks, dtype):
    inputs = qkv(dtype)
    sinks = torch.randn(HEADS).to(dtype) if has_sinks else None
    attention = attention_of(window, softcap, sinks)
    dy = torch.randn(inputs[0].shape).to(dtype)

    def plainly(inputs: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = expected(attention, *leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    y, log_sums = attention.forward(*inputs)
    ours = [y, *attention.backward(dy, *inputs, y, log_sums)]
    exact, peer = plainly([x.double() for x in inputs]), plainly(inputs)
    for results in zip(ours, peer, exact, ("y", "dq", "dk", "dv"), strict=True):
        assert_no_further(*results)


def test_masks_differ_by_head_sequence_block_and_seed():
    q, k, _ = qkv()
    kept = score_mask(attention_of(), q, k)  # (tokens, heads, tokens)
    long = kept[20:310, :, 20:310]
    seen = torch.ones(290, 290).tril().bool()
    share = torch.stack([long[:, head][seen].mean() for head in range(HEADS)])
    assert (share - 0.75).abs().max() < 0.01
    others = score_mask(attention_of(seed=5), q, k)[20:310, :, 20:310]
    below = torch.ones(34, 34).tril().bool()
    pairs = [(long[:, a][seen], long[:, b][seen]) for a, b in itertools.combinations(range(4), 2)]
    pairs += [(long[:, head][seen], others[:, head][seen]) for head in range(HEADS)]
    # The first queries of the second block of 256, and those of another group, against the first's.
    pairs += [(long[:34, head, :34][below], long[256:, head, :34][below]) for head in range(HEADS)]
    pairs += [
        (long[:20, h, :20][below[:20, :20]], kept[:20, h, :20][below[:20, :20]])
        for h in range(HEADS)
    ]
    for a, b in pairs:
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 5 / len(a) ** 0.5


def test_the_interface_draws_a_mask_for_each_call():
    q, k, v = (x.transpose(0, 1)[None] for x in qkv())

    def attend(dropout: float) -> Tensor:
        options = {"packing": Packing(LENGTHS), "dropout": dropout}
        return packed_attention(nn.Identity(), q, k, v, None, **options)[0]

    torch.manual_seed(1)
    first, second = attend(0.2), attend(0.2)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(attend(0.2), first)
    assert torch.equal(attend(0.0), attend(0.0))
