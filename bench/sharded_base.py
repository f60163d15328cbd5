"""Does a base train whose shards fit into each process's memory, and whose whole does not?

python -m bench.sharded_base

A Llama shape with random weights in bfloat16, written to --out and deleted afterwards, and computed
in float32: weights in the files' dtype would stay mapped, and count as page cache. It trains in one
process with a memory limit, which the kernel is expected to end; in --processes processes, each
with a limit of its own that is the same, over the sharded base; and in one process without a limit,
whose losses the sharded ones must equal but for rounding. Limits count page cache too. Needs root
on Linux, for control groups.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

import veneer
from bench.limit import drop_caches, limited
from bench.walk import watched
from bench.workloads import random_rows
from veneer.files import write_tensors
from veneer.models.block_buffers import passes_of
from veneer.models.load import load_base
from veneer.models.sharded import bytes_a_pass
from veneer.models.source import INDEX
from veneer.processes.world import World
from veneer.training.events import Started, Step

VOCABULARY = 4096


def shape(blocks: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def write_base(directory: Path, config: LlamaConfig) -> int:
    """Write a base of random weights, a file a block, and return its bytes."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    directory.mkdir(parents=True)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in skeleton.state_dict().items():
        block = next((part for part in name.split(".") if part.isdigit()), "ends")
        files.setdefault(f"model-{block}.safetensors", {})[name] = weight
    torch.manual_seed(0)
    index: dict[str, str] = {}
    for file, weights in files.items():
        write_tensors(
            directory / file,
            {
                name: torch.randn(weight.shape, dtype=torch.bfloat16).mul_(0.02)
                if weight.ndim > 1
                else torch.ones(weight.shape, dtype=torch.bfloat16)
                for name, weight in weights.items()
            },
        )
        index |= dict.fromkeys(weights, file)
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    about = {"metadata": {"total_size": size}, "weight_map": index}
    (directory / INDEX).write_text(json.dumps(about), encoding="utf-8")
    config.save_pretrained(directory)
    return size


def train(asked: argparse.Namespace) -> dict[str, Any]:
    """Train over the base, in this process of `asked.processes`, and return what was measured."""
    if asked.processes > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{asked.out / 'rendezvous'}",
            rank=asked.rank,
            world_size=asked.processes,
        )
    world = World.current()
    with watched() as peaks:
        base: Any = load_base(asked.out, dtype="float32", tokenizer=object(), world=world)  # type: ignore[arg-type]
        loaded = peaks["RssAnon"]
        veneer.attach(base.model, veneer.LoRA(rank=8), seed=0)
        rows = random_rows(2 * asked.steps, asked.tokens // 2, VOCABULARY)
        config = veneer.TrainConfig(
            steps=asked.steps, tokens_per_step=asked.tokens, warmup=0, schedule="constant"
        )
        losses, seconds, begun = [], [], 0
        for event in veneer.train(base.model, rows, config, world=world):
            if isinstance(event, Started):
                begun = world.sent.bytes_of.get("shards", 0)
            if isinstance(event, Step):
                losses.append(event.loss)
                seconds.append(event.seconds)
        sent = world.sent.bytes_of.get("shards", 0) - begun
        passes = passes_of(base.model)
    return {
        "losses": losses,
        "seconds": seconds,
        "loaded": loaded,
        "anonymous": peaks["RssAnon"],
        "sent": sent / asked.steps,
        "formula": bytes_a_pass(passes) if passes else 0,
    }


def start(
    asked: argparse.Namespace, rank: int, processes: int, enter: Callable[[], None] | None
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.sharded_base", "--out", str(asked.out)]
    command += ["--rank", str(rank), "--processes", str(processes)]
    command += ["--tokens", str(asked.tokens), "--steps", str(asked.steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)


def measured(process: subprocess.Popen[str]) -> dict[str, Any] | int:
    """Return what a process measured, or the code with which it ended."""
    output, _ = process.communicate()
    return process.returncode or json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("/tmp/veneer-sharded-base"))
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1.6, help="GB of each process")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rank", type=int, help="train in this process")
    asked = parser.parse_args()
    if asked.rank is not None:
        print(json.dumps(train(asked)))
        return
    limit = int(asked.limit * 1e9)
    try:
        size = write_base(asked.out, shape(asked.blocks))
        drop_caches()
        with limited(limit) as (enter, _):
            alone = measured(start(asked, 0, 1, enter))
        drop_caches()
        with ExitStack() as groups:
            each = [
                groups.enter_context(limited(limit, f"-{rank}")) for rank in range(asked.processes)
            ]
            running = [
                start(asked, rank, asked.processes, enter) for rank, (enter, _) in enumerate(each)
            ]
            shared = [measured(process) for process in running]
            peaks = [peak() for _, peak in each]
        free = measured(start(asked, 0, 1, None))
    finally:
        shutil.rmtree(asked.out, ignore_errors=True)
    print(
        f"Base: {2 * size / 1e9:.2f} GB in float32; limit of each process {asked.limit:.2f} GB.\n"
    )
    print("| processes | peak of its group | anonymous | sent a step | formula | losses |")
    print("|---|---|---|---|---|---|")
    if isinstance(alone, int):
        print(f"| one, limited | – | – | – | – | ended with {alone} |")
    else:
        print("| one, limited | it fits, so this says nothing |")
    for rank, (report, peak) in enumerate(zip(shared, peaks, strict=True)):
        print(_line(f"{rank} of {asked.processes}, limited", report, f"{peak / 1e9:.2f} GB"))
    print(_line("one, ample", free, "–"))


def _line(name: str, report: dict[str, Any] | int, peak: str) -> str:
    if isinstance(report, int):
        return f"| {name} | {peak} | – | – | – | ended with {report} |"
    losses = " ".join(f"{loss:.5f}" for loss in report["losses"])
    sent, formula = (f"{report[key]:,.0f}" for key in ("sent", "formula"))
    return (
        f"| {name} | {peak} | {report['anonymous'] / 1e9:.2f} GB | {sent} | {formula} | {losses} |"
    )


if __name__ == "__main__":
    main()
