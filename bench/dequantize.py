"""How many rows of a quantized weight should be dequantized at a time, and how fast is each format?

python -m bench.dequantize
python -m bench.dequantize --published   # how long each published format takes, beside a copy
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from veneer.kernels.heap import kept_heap
from veneer.quant import weight as quantized
from veneer.quant.awq import AWQ
from veneer.quant.compressed import CompressedInt
from veneer.quant.fp8 import FP8
from veneer.quant.gguf_blocks import GGUFBlocks
from veneer.quant.gguf_formulas import FORMULAS
from veneer.quant.gptq import GPTQ
from veneer.quant.mxfp4 import MXFP4
from veneer.quant.nf4 import NF4
from veneer.quant.weight import QuantizedWeight

# Tokens in a pass, and the layer's out and in: of a 70B and of a 7B model.
CASES = ((64, 28672, 8192), (64, 8192, 28672), (512, 11008, 4096), (512, 4096, 11008))
SIZES = (21, 22, 23, 24, 25, 28)


def best(run: Callable[[], object], times: int = 5) -> float:
    """Return the least milliseconds of several runs."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)


def times(tokens: int, out: int, in_: int) -> list[str]:
    """Return forward and backward milliseconds: over a dense weight, and for each size."""
    weight = NF4.quantize(0.02 * torch.randn(out, in_), torch.bfloat16)
    x = torch.randn(tokens, in_, dtype=torch.bfloat16)
    y = torch.empty(tokens, out, dtype=torch.bfloat16)
    dense = weight.dequantize()
    seconds = [(best(lambda: torch.mm(x, dense.T, out=y)), best(lambda: y @ dense))]
    for size in SIZES:
        quantized.BLOCK_NUMBERS = 2**size
        forward = best(lambda: quantized.product(x, weight, y))
        seconds.append((forward, best(lambda: quantized.product_back(y, weight))))
    return [f"{forward:.0f} + {back:.0f} ms" for forward, back in seconds]


def random_words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape).to(torch.int32)


def published(size: int = 4096, group: int = 128) -> dict[str, QuantizedWeight]:
    """Return random weights (size, size), one of each published format."""
    groups, dtype = size // group, torch.bfloat16
    scales = torch.rand(groups, size).half()
    e4m3 = torch.randn(size, size).to(torch.float8_e4m3fn)
    blocks = torch.randint(256, (size, size // 32, 16)).to(torch.uint8)
    packed = {
        "weight_packed": random_words(size, size // 8),
        "weight_shape": torch.tensor([size, size]),
        "weight_scale": scales.T.contiguous(),
    }
    weights: dict[str, QuantizedWeight] = {
        "NF4": NF4.quantize(torch.randn(size, size), dtype),
        "MXFP4": MXFP4(blocks, blocks[:, :, 0] // 8 + 100, dtype),
        "FP8": FP8(e4m3, torch.rand(groups, groups), dtype, block=(group, group)),
        "AWQ": AWQ(
            random_words(size, size // 8),
            random_words(groups, size // 8),
            scales,
            dtype,
            group=group,
        ),
        "compressed-tensors, 4 bits": CompressedInt(packed, dtype, bits=4, group=group),
    }
    for bits in (4, 8):
        for apart in (False, True):
            group_of = torch.arange(size, dtype=torch.int32) // group
            words, zeros = (
                random_words(size * bits // 32, size),
                random_words(groups, size * bits // 32),
            )
            weights[f"GPTQ, {bits} bits{', desc_act' if apart else ''}"] = GPTQ(
                words,
                zeros,
                scales,
                dtype,
                inputs=size,
                group=group,
                group_of=group_of[torch.randperm(size)] if apart else group_of,
            )
    return weights


def show_published() -> None:
    weights = published()
    copied = torch.empty(4096, 4096, dtype=torch.bfloat16)
    source = torch.randn_like(copied)
    with kept_heap():
        print(f"copy: {best(lambda: copied.copy_(source), 9):.2f} ms")
        for name, weight in weights.items():
            print(f"{name}: {best(weight.dequantize, 9):.2f} ms", flush=True)
        print(f"copy: {best(lambda: copied.copy_(source), 9):.2f} ms")


def rates() -> None:
    """Print how many numbers a second are made of each of GGUF's formats, and of NF4."""
    rows, cols = 4096, 2048
    weights: list[QuantizedWeight] = [NF4.quantize(0.02 * torch.randn(rows, cols), torch.bfloat16)]
    for kind in FORMULAS:
        numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        codes = torch.randint(0, 100, (rows, cols // numbers * size), dtype=torch.uint8)
        weights.append(GGUFBlocks(kind, codes, torch.bfloat16))
    print("\n| format | thousand million numbers a second |\n|---|---|")
    for weight in weights:
        rate = rows * cols / best(weight.dequantize, 9) / 1e6
        print(f"| {weight.label} | {rate:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--published", action="store_true")
    if parser.parse_args().published:
        show_published()
        return
    print("| tokens, out × in | dense | " + " | ".join(f"2^{size}" for size in SIZES) + " |")
    print("|---" * (2 + len(SIZES)) + "|")
    with kept_heap():
        for tokens, out, in_ in CASES:
            cells = " | ".join(times(tokens, out, in_))
            print(f"| {tokens}, {out} × {in_} | {cells} |", flush=True)
        rates()


if __name__ == "__main__":
    main()
