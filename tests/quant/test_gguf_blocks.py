"""Weights in GGUF's blocks: every number is gguf-py's to the bit, natively and in torch."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from support.closeness import assert_no_further
from veneer.quant import gguf_blocks
from veneer.quant.gguf_blocks import GGUFBlocks
from veneer.quant.gguf_formulas import FORMULAS
from veneer.quant.weight import product, product_back

ROWS, BLOCKS = 48, 3


def random_codes(kind: str, *, seed: int = 0) -> torch.Tensor:
    """Return rows of random bytes: every code, scale and sign, numbers that are not finite too."""
    _, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    bytes_ = np.random.default_rng(seed).integers(0, 256, (ROWS, BLOCKS * size), dtype=np.uint8)
    return torch.from_numpy(bytes_)


def oracle(kind: str, codes: torch.Tensor) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.dequantize(codes.numpy(), GGMLQuantizationType[kind]))


def bits(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bits of numbers, and where they are none."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    return values.masked_fill(values.isnan(), 0).view(integers), values.isnan()


def assert_same_bits(ours: torch.Tensor, expected: torch.Tensor) -> None:
    for mine, theirs in zip(bits(ours), bits(expected), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("compiled", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("kind", FORMULAS)
def test_every_number_is_gguf_s_own(kind, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(gguf_blocks, "kernel", lambda *_, **__: None)
    codes = random_codes(kind)
    expected = oracle(kind, codes)
    assert expected.isfinite().float().mean() > 0.8
    assert (expected < 0).any()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight = GGUFBlocks(kind, codes, dtype)
        assert weight.shape == expected.shape
        assert_same_bits(weight.dequantize(), expected.to(dtype))
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    weight = GGUFBlocks(kind, codes, torch.float32, order=order)
    assert_same_bits(weight.dequantize(), expected[order])
    some = torch.tensor([7, 3, 7])
    assert_same_bits(weight.rows(some), expected[order][some])


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_products_with_rows_in_another_order_are_those_of_the_dense_weight(kind, monkeypatch):
    monkeypatch.setattr("veneer.quant.weight.BLOCK_NUMBERS", 5 * 256 * BLOCKS)  # blocks of rows
    codes = random_codes(kind)
    codes = codes[oracle(kind, codes).isfinite().all(1)]
    order = torch.arange(len(codes)).flip(0)
    weight = GGUFBlocks(kind, codes, torch.float32, order=order)
    dense = oracle(kind, codes)[order]
    x, dy = torch.randn(4, weight.shape[1]), torch.randn(4, weight.shape[0])
    assert_same_bits(torch.cat([rows for _, rows in weight.blocks()]), dense)
    y = product(x, weight, x.new_empty(4, weight.shape[0]))
    wide = dense.double()
    for ours, plain, exact in (
        (y, x @ dense.T, x.double() @ wide.T),
        (product_back(dy, weight), dy @ dense, dy.double() @ wide),
    ):
        assert_no_further(ours, plain, exact)


def test_it_says_how_large_it_is_and_what_it_is_called():
    weight = GGUFBlocks("Q4_K", random_codes("Q4_K"), torch.bfloat16)
    assert (weight.bits, weight.label, weight.published) == (4, "Q4_K", True)
    assert 8 * weight.nbytes / weight.shape.numel() == 4.5
