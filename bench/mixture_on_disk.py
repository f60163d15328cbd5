"""Does a mixture twice as large as the memory allowed train, and to the same losses?

python -m bench.mixture_on_disk

A Qwen3-30B-A3B shape with random weights, quantized as they are made, the head in 4 bits and the
embedding in 8 too: 16 GB, written to --out and deleted afterwards unless --keep. It trains with a
limit of 8 GB, page cache included, and with none: adapters on everything, experts too. Needs root
on Linux, for a control group of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Qwen3MoeConfig

import veneer
from bench.limit import drop_caches, limited
from bench.random_base import write_random_base
from bench.walk import bytes_read, watched
from bench.workloads import random_rows
from veneer.models.dtype import resolve_dtype
from veneer.models.fingerprint import parameter_count
from veneer.models.load import load_skeleton
from veneer.models.stored import load_quantized
from veneer.plan.presets import PRESETS
from veneer.quant.stack import QuantizedStack, quantized_stacks
from veneer.training.events import Started, Step

TOKENS = (64, 256, 1024)
APART = 1_000.0  # by this the embedding outweighs all that 48 random blocks add to it


def shape(blocks: int) -> Qwen3MoeConfig:
    preset = PRESETS["qwen3-30b-a3b"] | {"num_hidden_layers": blocks}
    return Qwen3MoeConfig(**preset, norm_topk_prob=True)


def train(base: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Train over the base with each number of tokens, and return what was measured."""
    runs = []
    with watched() as peaks:
        start = time.perf_counter()
        model = load_quantized(base, load_skeleton(base), resolve_dtype(asked.dtype))
        veneer.attach(model, veneer.LoRA(rank=16, targets=asked.targets), seed=0)
        routed = count_routed(model)
        loaded = time.perf_counter() - start
        for tokens in asked.tokens:
            config = veneer.TrainConfig(
                steps=asked.steps,
                tokens_per_step=tokens,
                recompute=asked.recompute,
                warmup=0,
                schedule="constant",
            )
            steps, read, before = [], [bytes_read()], routed()
            for event in veneer.train(model, random_rows(asked.steps, tokens, 30_000), config):
                if isinstance(event, Started):
                    read, before = [bytes_read()], routed()
                if not isinstance(event, Step):
                    continue
                steps.append(event)
                read.append(bytes_read())
                print(tokens, event.seconds, event.loss, dict(peaks), file=sys.stderr, flush=True)
            run = {
                "tokens": tokens,
                "seconds": [step.seconds for step in steps],
                "losses": [step.loss for step in steps],
                "experts": (routed() - before) // (2 * asked.steps),
                "bytes_read": [b - a for a, b in pairwise(read)],
                "anonymous": peaks["RssAnon"],
            }
            runs.append(run)
    return {
        "loaded_seconds": loaded,
        "parameters": parameter_count(model),
        "trained": sum(w.numel() for w in model.parameters() if w.requires_grad),
        "runs": runs,
    }


def count_routed(model: nn.Module) -> Callable[[], int]:
    """Return what tells how many experts have been used so far, each pass by itself."""
    counts = [0]

    def counting(stack: QuantizedStack) -> Callable[[Sequence[int]], None]:
        read_ahead = stack.before_routed

        def note(ids: Sequence[int]) -> None:
            counts[0] += len(ids)
            if read_ahead is not None:
                read_ahead(ids)

        return note

    for path, stack in quantized_stacks(model).items():
        if path.endswith("down_proj"):
            stack.before_routed = counting(stack)
    return lambda: counts[0]


def apart(asked: argparse.Namespace, enter: Callable[[], None] | None = None) -> dict[str, Any]:
    """Return what `train` returns in a process of its own."""
    drop_caches()
    command = [sys.executable, "-m", "bench.mixture_on_disk", "--here", "--out", str(asked.out)]
    command += ["--tokens", *map(str, asked.tokens), "--steps", str(asked.steps)]
    command += ["--dtype", asked.dtype, "--recompute", asked.recompute, "--targets", *asked.targets]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, preexec_fn=enter)
    if done.returncode:
        sys.exit(f"ended with {done.returncode}")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("/tmp/veneer-mixture-on-disk"))
    parser.add_argument("--keep", action="store_true", help="leave the base, or take one left")
    parser.add_argument("--blocks", type=int, default=48)
    parser.add_argument("--limit", type=float, default=8.0, help="GB, page cache included")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--targets", nargs="+", default=["all"])
    parser.add_argument("--dtype", default="auto", help="that products are computed in")
    parser.add_argument("--recompute", default="selective")
    parser.add_argument(
        "--balanced",
        action="store_true",
        help="an embedding so large that the routers tell tokens apart, and reach most experts",
    )
    parser.add_argument("--here", action="store_true", help="train in this process")
    asked = parser.parse_args()
    if asked.here:
        print(json.dumps(train(asked.out, asked)))
        return
    try:
        if not (asked.keep and asked.out.is_dir()):
            scale = APART if asked.balanced else 1.0
            write_random_base(asked.out, shape(asked.blocks), pack_ends=True, embedding_scale=scale)
        size = sum(file.stat().st_size for file in asked.out.glob("*.safetensors"))
        with limited(int(asked.limit * 1e9)) as (enter, peak):
            tight = apart(asked, enter)
            most = peak()
        free = apart(asked)
    finally:
        if not asked.keep:
            shutil.rmtree(asked.out, ignore_errors=True)
    print(
        f"Base: {tight['parameters']:,} parameters in {size / 1e9:.2f} GB, "
        f"{8 * size / tight['parameters']:.3f} bits each; {tight['trained']:,} trained. "
        f"Opened in {tight['loaded_seconds']:.1f} s.\n"
    )
    print(
        "| tokens a step | memory | experts a pass | seconds a step | read a step | "
        "anonymous so far | losses |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, report in (("limited", tight), ("ample", free)):
        for run in report["runs"]:
            seconds = " ".join(f"{value:.1f}" for value in run["seconds"])
            read = " ".join(f"{value / 1e9:.1f}" for value in run["bytes_read"])
            losses = " ".join(f"{loss:.6f}" for loss in run["losses"])
            print(
                f"| {run['tokens']:,} | {name} | {run['experts']:,} | {seconds} | {read} GB | "
                f"{run['anonymous'] / 1e9:.2f} GB | {losses} |"
            )
    same = [run["losses"] for run in tight["runs"]] == [run["losses"] for run in free["runs"]]
    print(
        f"\nLosses are {'the same to the bit' if same else 'NOT the same'}; "
        f"the group's peak {most / 1e9:.2f} GB, cache included."
    )


if __name__ == "__main__":
    main()
