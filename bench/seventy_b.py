"""Does a 70B model train in 24 GB? Once, for real: LoRA over a Llama of that shape, on disk in NF4.

python -m bench.seventy_b

The weights are random (time and memory do not depend on them): 36 GB, written to --place and
deleted afterwards. The run has 24 GB in all, page cache included: it needs root on Linux, for a
control group of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import LlamaConfig

from bench.limit import drop_caches, limited
from bench.random_base import write_random_base

LIMIT = 24 * 10**9
CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--place", type=Path, default=Path("/tmp/veneer-seventy-b"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--recompute", default="selective")
    asked = parser.parse_args()
    try:
        size = write_random_base(asked.place, CONFIG)
        command = [sys.executable, "-m", "bench.walk", str(asked.place), "--shares"]
        command += ["--tokens", str(asked.tokens), "--steps", str(asked.steps)]
        command += ["--rank", "16", "--recompute", asked.recompute]
        drop_caches()
        with limited(LIMIT) as (enter, peak):
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, preexec_fn=enter
            )
            most = peak()
    finally:
        shutil.rmtree(asked.place, ignore_errors=True)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    report = json.loads(done.stdout.splitlines()[-1])
    peaks = {key: bytes_ / 1e9 for key, bytes_ in report["peaks"].items()}
    quantized = report["quantized_parameters"]
    bits = 8 * report["quantized_bytes"] / quantized
    print(
        f"Base: {quantized:,} parameters in NF4 ({bits:.3f} bits each), "
        f"{size / 1e9:.1f} GB on disk; rank 16 on q, k, v, o: {report['trained']:,} trained.\n"
    )
    print(
        f"- opened in {report['loaded_seconds']:.1f} s; shortcuts proven in "
        f"{report['proven_seconds']:.0f} s"
    )
    for number, (seconds, read, loss) in enumerate(
        zip(report["seconds"], report["bytes_read"], report["losses"], strict=True), 1
    ):
        print(
            f"- step {number}: {seconds:.1f} s for {asked.tokens} tokens, "
            f"{read / 1e9:.1f} GB read ({read / 1e9 / seconds:.2f} GB/s), loss {loss:.4f}"
        )
    print(
        f"- peak resident: {peaks['RssAnon']:.2f} GB anonymous, {peaks['RssFile']:.2f} GB files, "
        f"{peaks['VmRSS']:.2f} GB together"
    )
    print(f"- the group's peak, page cache included: {most / 1e9:.2f} GB of {LIMIT / 1e9:.0f} GB")
    for share, seconds in report["shares"].items():
        print(
            f"- {share}: {seconds:.1f} s, {seconds / sum(report['seconds']):.0%} of the steps' time"
        )


if __name__ == "__main__":
    main()
