"""Does a base three times as large as the memory allowed train, and to the same losses?

python -m bench.streaming

Needs root on Linux, for a control group of its own. The base is written to --place and deleted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from transformers import LlamaConfig

from bench.limit import drop_caches, limited
from bench.random_base import write_random_base


def walk(base: Path, asked: argparse.Namespace, enter: Callable[[], None] | None = None) -> dict:
    drop_caches()
    command = [sys.executable, "-m", "bench.walk", str(base), "--tokens", str(asked.tokens)]
    command += ["--steps", str(asked.steps), "--recompute", asked.recompute, "--rank", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=enter)
    if done.returncode:
        sys.exit(f"ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--place", type=Path, default=Path("/tmp/veneer-streaming"))
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--recompute", default="full")
    asked = parser.parse_args()
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=asked.layers,
        num_attention_heads=40,
        tie_word_embeddings=False,
    )
    try:
        size = write_random_base(asked.place, config)
        limit = size // 3
        free = walk(asked.place, asked)
        with limited(limit) as (enter, peak):
            tight = walk(asked.place, asked, enter)
            most = peak()
    finally:
        shutil.rmtree(asked.place, ignore_errors=True)
    times = [median(run["seconds"][1:]) for run in (free, tight)]
    reads = [median(run["bytes_read"][1:]) / 1e9 for run in (free, tight)]
    anonymous = [run["peaks"]["RssAnon"] / 1e9 for run in (free, tight)]
    print(f"Base on disk {size / 1e9:.2f} GB; memory limit {limit / 1e9:.2f} GB, a third of it.\n")
    print("| memory | seconds a step | read a step | most anonymous | losses |")
    print("|---|---|---|---|---|")
    for name, run, *values in zip(("ample", "limited"), (free, tight), times, reads, anonymous):  # noqa: B905
        losses = " ".join(f"{loss:.6f}" for loss in run["losses"])
        print("| {} | {:.2f} | {:.2f} GB | {:.2f} GB | {} |".format(name, *values, losses))
    same = free["losses"] == tight["losses"]
    print(
        f"\nLosses are {'the same to the bit' if same else 'NOT the same'}; "
        f"time {times[1] / times[0]:.2f} ×; the group's peak {most / 1e9:.2f} GB, cache included."
    )


if __name__ == "__main__":
    main()
