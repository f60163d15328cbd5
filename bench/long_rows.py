"""One long row a step under a limit of memory: its time and memory, and the longest that fits.

    python -m bench.long_rows --lengths 8192 32768
    python -m bench.long_rows --longest

The limit is that of a control group which each process joins once the model is loaded, so that it
is on what training takes above the weights. Needs Linux, and the right to make such a group.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import veneer
from bench.engines import Run, run_peft, run_veneer
from bench.workloads import Workload, random_rows
from veneer.models.load import load_config_and_tokenizer
from veneer.training.memory import process_memory

CONTEXT = 2**20
SHORT = 2048, 4096, 8192  # of these lengths, memory is measured to foretell the longest
STEP = 1024  # by which the longest row that is foretold is shortened until it fits
GROUPS = Path("/sys/fs/cgroup")


def _checkpointing(base: veneer.Base, work: Workload) -> Run:
    base.model.gradient_checkpointing_enable()
    base.model.enable_input_require_grads()
    return run_peft(base, work)


WAYS = {
    "none": run_veneer,
    "selective": partial(run_veneer, recompute="selective"),
    "full": partial(run_veneer, recompute="full"),
    "disk": partial(run_veneer, recompute="disk"),
    "peft": run_peft,
    "peft, checkpointing": _checkpointing,
}


def measure(way: str, length: int, *, layers: int | None, steps: int, limit: int) -> dict:
    """Train here, in a group of its own; return the last step's seconds, and the most memory that
    is the process's own, and with pages of files, beyond what the loaded model has."""
    config, tokenizer = load_config_and_tokenizer("smollm2-135m")
    config.max_position_embeddings = CONTEXT
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    base = veneer.Base("smollm2-135m's shape", model, tokenizer)
    examples = random_rows(steps, length, config.vocab_size)
    work = Workload(way, examples, [[i] for i in range(steps)], [])
    if limit:
        _join_group(limit)
    loaded = process_memory("RssAnon")
    with peak_memory() as peak:
        *_, (seconds, loss) = WAYS[way](base, work)
    return {"seconds": seconds, "bytes": peak[0] - loaded, "loss": loss}


def run(way: str, length: int, asked: argparse.Namespace, *, limit: int) -> dict | None:
    """Return what `measure` gives in a process of its own, or None where the limit is too low."""
    command = [sys.executable, "-m", "bench.long_rows", "--here", way, "--lengths", str(length)]
    command += ["--steps", str(asked.steps), "--limit", str(limit)]
    command += ["--layers", str(asked.layers)] if asked.layers else []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        out, errors = process.communicate()
    if _group(process.pid).exists():
        _group(process.pid).rmdir()
    if process.returncode == -9 or "memory" in errors.lower().rpartition("error")[2]:
        return None
    if process.returncode:
        sys.exit(f"{way} at {length} failed:\n{errors[-4000:]}")
    return json.loads(out.splitlines()[-1])


def longest(way: str, asked: argparse.Namespace) -> tuple[int, dict | None]:
    """Return the longest row that trains within the limit, in steps of STEP, and its figures."""
    measured = [(n, made) for n in SHORT if (made := run(way, n, asked, limit=asked.limit))]
    if not measured:
        return SHORT[0], None
    if len(measured) == len(SHORT):
        (n, first), (m, last) = measured[0], measured[-1]
        a_token = (last["bytes"] - first["bytes"]) / (m - n)
        length = int(m + (asked.limit - last["bytes"]) / a_token) // STEP * STEP
    else:
        length = SHORT[len(measured)] - STEP
    while length > measured[-1][0]:
        if made := run(way, length, asked, limit=asked.limit):
            return length, made
        length -= max(STEP, length // 16 // STEP * STEP)
    return measured[-1]


def _group(pid: int) -> Path:
    one = GROUPS / "memory" if (GROUPS / "memory").is_dir() else GROUPS
    return one / f"veneer-long-rows-{pid}"


def _join_group(limit: int) -> None:
    group = _group(os.getpid())
    group.mkdir()
    name = "memory.max" if (group / "memory.max").exists() else "memory.limit_in_bytes"
    (group / name).write_text(str(limit), encoding="ascii")
    (group / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Yield a list of one number: the most of the process's own memory so far."""
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], process_memory("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--lengths", nargs="*", type=int, default=[8192, 32_768])
    parser.add_argument("--longest", action="store_true")
    parser.add_argument("--limit", type=int, default=4 * 10**9, help="bytes above the weights")
    parser.add_argument("--layers", type=int, help="instead of 30")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--here", choices=WAYS, help="run this way in this process")
    asked = parser.parse_args()
    if asked.here:
        (length,) = asked.lengths
        print(
            json.dumps(
                measure(
                    *(asked.here, length), layers=asked.layers, steps=asked.steps, limit=asked.limit
                )
            )
        )
        return
    print("| way | tokens in the row | a step | own memory above the weights |")
    print("|---|---|---|---|")
    for way in asked.ways:
        for length in [None] if asked.longest else asked.lengths:
            made: dict | None
            if length is None:
                length, made = longest(way, asked)
            else:
                made = run(way, length, asked, limit=asked.limit)
            row = "does not fit |" if made is None else ""
            row = row or f"{made['seconds']:.1f} s | {made['bytes'] / 1e9:.2f} GB"
            print(f"| {way} | {length:,} | {row} |", flush=True)


if __name__ == "__main__":
    main()
