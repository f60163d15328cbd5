"""Training over an offloaded base on the pretend GPU: what would wait, and what is on the card."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import veneer
from support.fake_card import CARD, card, on_card
from support.random_adapters import examples
from support.tiny_models import quantized, tiny
from veneer.fused import forward as forwards
from veneer.models import block_buffers, offload
from veneer.models.block_buffers import passes_of
from veneer.quant.settings import Offload
from veneer.training import loop

ROWS = examples([9, 13, 5])
COURSE = veneer.TrainConfig(steps=2, lr=0.01, tokens_per_step=64, warmup=0)


def run(place: Offload, bits: int | None = None) -> dict[str, Any]:
    """Train for two steps, and return what would have waited, the most blocks that were on the
    card, and whether they were filled ahead."""
    model = quantized("llama", bits) if bits else tiny("llama")
    whole: list[int] = []
    with card() as watch, ExitStack() as stack, TemporaryDirectory() as directory:
        stack.enter_context(patch.object(block_buffers, "SMALL", 100))
        stack.enter_context(patch.object(forwards, "_why_not", lambda *a: None))  # no numbers
        model = on_card(model)
        stack.enter_context(patch.object(offload, "_in_file", _in_file))
        # Only this thread has the pretend GPU.
        stack.enter_context(patch.object(ThreadPoolExecutor, "submit", _at_once))
        offload.offloader(model, place, CARD, directory=Path(directory)).finish()
        veneer.attach(model, veneer.LoRA(rank=3, targets=("all",)), seed=0)
        passes = passes_of(model)
        assert passes is not None
        begin = block_buffers.Buffer.begin

        def begun(buffer: block_buffers.Buffer) -> None:
            begin(buffer)
            whole.append(sum(_is_whole(x) for x in passes.buffers))

        stack.enter_context(patch.object(block_buffers.Buffer, "begin", begun))
        learn = loop.learn

        def counted(*args: Any, **options: Any) -> Any:
            with watch.counting() as seen:
                result = learn(*args, **options)
            waits.extend(seen)
            return result

        waits: list[str] = []
        stack.enter_context(patch.object(loop, "learn", counted))
        events = list(veneer.train(model, ROWS, COURSE))
        devices = {str(p.device) for p in model.parameters()}
    return {
        "waits": sorted(set(waits)),
        "most_whole": max(whole),
        "buffers": len(passes.buffers),
        "devices": sorted(devices),
        "events": [type(event).__name__ for event in events],
    }


def _at_once(pool: ThreadPoolExecutor, work: Callable[..., Any], *args: Any) -> Future:
    done: Future = Future()
    done.set_result(work(*args))
    return done


def _in_file(source: Tensor, directory: Path) -> Tensor:
    """Return memory of the host in place of what a file would have of the card's numbers."""
    return torch.zeros(len(source), dtype=torch.uint8)


def _is_whole(buffer: block_buffers.Buffer) -> bool:
    return buffer._whole.untyped_storage().nbytes() > 0


CASES = {"cpu": partial(run, "cpu")}
SLOW_CASES = {"disk": partial(run, "disk"), "cpu, NF4": partial(run, "cpu", 4)}
