"""One LoRA run over a quantized base on disk, in a process of its own: prints one line of JSON.

python -m bench.walk BASE --tokens 64 --steps 2
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import veneer
from bench.workloads import random_rows
from veneer.lowrank import projection
from veneer.models.fingerprint import parameter_count
from veneer.models.load import load_skeleton
from veneer.models.stored import load_quantized
from veneer.quant import weight as quantized
from veneer.quant.nf4 import NF4
from veneer.quant.stack import quantized_weights
from veneer.training.events import Started, Step
from veneer.training.memory import process_memory


def bytes_read() -> int:
    """Return what this process had read from the disk."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Note the most anonymous and the most file-backed memory that was resident."""
    peaks = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            for key in peaks:
                peaks[key] = max(peaks[key], process_memory(key))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


class Shares:
    """Seconds spent reading quantized weights, dequantizing them, and multiplying by them."""

    def __init__(self) -> None:
        self.reading = self.dequantising = self.inside = 0.0
        NF4._dequantize_rows = self._dequantize_timed(NF4._dequantize_rows)  # type: ignore[method-assign]
        for module in (projection, quantized):
            for name in ("product", "product_back"):
                setattr(module, name, self._timed(getattr(module, name)))

    def begin(self) -> None:
        """Count from here on."""
        self.reading = self.dequantising = self.inside = 0.0

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each share."""
        products = self.inside - self.reading - self.dequantising
        return {"reading": self.reading, "dequantising": self.dequantising, "products": products}

    def _dequantize_timed(
        self, dequantize: Callable[..., torch.Tensor]
    ) -> Callable[..., torch.Tensor]:
        def timed(weight: NF4, first: int, last: int) -> torch.Tensor:
            half, start = weight.shape[1] // 2, time.perf_counter()
            weight.codes[first * half : last * half : 4096].max()  # a byte of each page
            there = time.perf_counter()
            values = dequantize(weight, first, last)
            self.reading += there - start
            self.dequantising += time.perf_counter() - there
            return values

        return timed

    def _timed(self, product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def timed(*arguments: Any) -> torch.Tensor:
            start = time.perf_counter()
            result = product(*arguments)
            self.inside += time.perf_counter() - start
            return result

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--targets", nargs="+", default=["attention"])
    parser.add_argument("--shares", action="store_true")
    asked = parser.parse_args()
    examples = random_rows(asked.steps, asked.tokens, 30_000)
    with watched() as peaks:
        start = time.perf_counter()
        model = load_quantized(asked.base, load_skeleton(asked.base), torch.bfloat16)
        veneer.attach(model, veneer.LoRA(rank=asked.rank, targets=asked.targets), seed=0)
        loaded = time.perf_counter() - start
        shares = Shares() if asked.shares else None
        config = veneer.TrainConfig(
            steps=asked.steps,
            tokens_per_step=asked.tokens,
            recompute=asked.recompute,
            warmup=0,
            schedule="constant",
        )
        steps, read, began = [], [bytes_read()], time.perf_counter()
        for event in veneer.train(model, examples, config):
            if isinstance(event, Started):
                proven, read = time.perf_counter() - began, [bytes_read()]
                if shares:
                    shares.begin()
            if isinstance(event, Step):
                steps.append(event)
                read.append(bytes_read())
    weights = quantized_weights(model).values()
    report = {
        "loaded_seconds": loaded,
        "proven_seconds": proven,
        "seconds": [step.seconds for step in steps],
        "losses": [step.loss for step in steps],
        "bytes_read": [b - a for a, b in pairwise(read)],
        "quantized_bytes": sum(weight.nbytes for weight in weights),
        "quantized_parameters": sum(weight.shape.numel() for weight in weights),
        "all_parameters": parameter_count(model),
        "trained": sum(w.numel() for w in model.parameters() if w.requires_grad),
        "peaks": peaks,
    }
    if shares:
        report["shares"] = shares.seconds()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
