"""Which way computes what, on which device: the whole table, and the notice of what is missing."""

from dataclasses import replace

import pytest
import torch

from veneer.kernels import choice
from veneer.kernels.choice import Device

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
CPU, MPS, XPU = Device("cpu"), Device("mps"), Device("xpu")
HOPPER = Device("cuda", (9, 0), flash=True, triton=True, liger=True)
ADA, BLACKWELL, GEFORCE_50 = (replace(HOPPER, capability=c) for c in ((8, 9), (10, 0), (12, 0)))
TURING = replace(HOPPER, capability=(7, 5))
BARE = replace(HOPPER, flash=False, triton=False, liger=False)
UNKNOWN = Device("cuda")  # AMD's, or one that only tests see


@pytest.mark.parametrize(
    ("device", "dtype", "head", "options", "way"),
    [
        (CPU, BF16, 64, {}, "native"),
        (CPU, BF16, 64, {"softcap": True, "dropout": True}, "native"),
        (HOPPER, BF16, 64, {}, "varlen"),
        (ADA, F16, 256, {}, "varlen"),
        (HOPPER, BF16, 512, {}, "groups"),
        (HOPPER, F32, 64, {}, "groups"),
        (TURING, F16, 64, {}, "groups"),
        (BARE, BF16, 64, {}, "groups"),
        (UNKNOWN, BF16, 64, {}, "groups"),
        (HOPPER, BF16, 64, {"softcap": True}, "flex"),
        (replace(HOPPER, triton=False), BF16, 64, {"softcap": True}, "groups"),
        (replace(HOPPER, flash=False), BF16, 64, {}, "groups"),
        (HOPPER, BF16, 64, {"dropout": True}, "blocks"),
        (HOPPER, BF16, 64, {"other_keys": True}, "groups"),
        (MPS, BF16, 64, {}, "groups"),
        (MPS, BF16, 64, {"dropout": True}, "blocks"),
        (XPU, BF16, 64, {"softcap": True}, "groups"),
    ],
)
def test_attention(device, dtype, head, options, way):
    assert choice.attention(device, dtype, head, **options) == way


@pytest.mark.parametrize(
    ("device", "dtypes", "way", "mixed"),
    [
        (CPU, [BF16], "native", "torch"),
        (replace(CPU, triton=True), [BF16], "native", "torch"),
        (HOPPER, [BF16, F32], "triton", "triton"),
        (ADA, [F16], "triton", "triton"),
        (HOPPER, [F64], "torch", "torch"),
        (TURING, [F16], "torch", "torch"),
        (BARE, [BF16], "torch", "torch"),
        (UNKNOWN, [BF16], "torch", "torch"),
        (MPS, [BF16], "torch", "torch"),
        (XPU, [F32], "torch", "torch"),
    ],
)
def test_what_takes_numbers_one_by_one_and_rows_of_different_adapters(device, dtypes, way, mixed):
    assert choice.elementwise(device, *dtypes) == way
    assert choice.mixed(device, *dtypes) == mixed


@pytest.mark.parametrize(
    ("device", "dtype", "centred", "plain", "way"),
    [
        (CPU, BF16, False, True, "native"),
        (HOPPER, BF16, False, True, "liger"),
        (HOPPER, F64, False, True, "torch"),
        (HOPPER, BF16, False, False, "torch"),
        (replace(HOPPER, liger=False), BF16, False, True, "torch"),
        (replace(HOPPER, triton=False), BF16, False, True, "torch"),
        (HOPPER, BF16, True, True, "layer_norm"),
        (MPS, F16, True, True, "layer_norm"),
        (HOPPER, BF16, True, False, "torch"),
    ],
)
def test_norm(device, dtype, centred, plain, way):
    assert choice.norm(device, dtype, centred=centred, plain=plain) == way


@pytest.mark.parametrize(
    ("device", "dtype", "widths", "quantized", "way"),
    [
        (CPU, BF16, [64, 32], False, "loop"),
        (HOPPER, BF16, [64, 32], False, "grouped"),
        (BLACKWELL, BF16, [64, 32], False, "grouped"),
        (GEFORCE_50, BF16, [64, 32], False, "loop"),
        (ADA, BF16, [64, 32], False, "loop"),
        (HOPPER, F16, [64, 32], False, "loop"),
        (HOPPER, BF16, [64, 36], False, "loop"),
        (HOPPER, BF16, [64, 32], True, "loop"),
        (UNKNOWN, BF16, [64, 32], False, "loop"),
    ],
)
def test_experts(device, dtype, widths, quantized, way):
    assert choice.experts(device, dtype, *widths, quantized=quantized) == way


def test_what_is_missing_is_said_once_and_with_what_to_do():
    assert [choice.slower_on(device) for device in (CPU, MPS, HOPPER, TURING)] == [""] * 4
    assert choice.slower_on(BARE).startswith("triton and liger-kernel would be faster here")
    assert "pip install 'veneer[gpu]'" in choice.slower_on(replace(HOPPER, liger=False))
    assert "flash attention" in choice.slower_on(replace(HOPPER, flash=False))


def test_experts_that_wait_are_announced_where_they_do():
    def why(device: Device, dtype: torch.dtype, *, quantized: bool = False) -> str:
        return choice.slower_experts_on(device, dtype, quantized=quantized)

    assert why(HOPPER, BF16) == why(CPU, BF16) == why(CPU, BF16, quantized=True) == ""
    assert "waits for the card" in why(ADA, BF16)
    assert "in bf16" in why(HOPPER, F16)
    assert "not quantized" in why(HOPPER, BF16, quantized=True)


def test_this_machine_is_described():
    assert choice.device_of(torch.device("cpu")) == CPU
