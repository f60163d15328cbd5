"""`make bench`: every question in turn, and the answers on docs/performance.md."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import torch

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
MARK = "<!-- measured: everything below is written by make bench -->"
QUESTIONS = (
    ("dense", "8 × 256 random tokens a step, every label counts", "7", "veneer,veneer-full,peft"),
    ("sft", "questions and answers, 8 rows a step", "16", "veneer,peft"),
    ("long", "1 × 2048 random tokens a step", "7", "veneer,peft"),
)


def features() -> str:
    """Return what decides speed here: cores and the processor's units for matrix products."""
    flags = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    )
    units = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in flags]
    return f"{torch.get_num_threads()} threads, {', '.join(units)}, torch {torch.__version__}"


def main() -> None:
    parts = [f"{MARK}\n\nMachine: {platform.machine()}, {features()}.\n"]
    for workload, what, steps, engines in QUESTIONS:
        command = ["-m", "bench.training", workload, "--steps", steps, "--engines", engines]
        done = subprocess.run(
            [sys.executable, *command], text=True, capture_output=True, check=False
        )
        if done.returncode:
            sys.exit(done.stderr)
        print(done.stdout, flush=True)
        parts.append(f"### {workload}: {what}\n\n`python {' '.join(command)}`\n\n{done.stdout}")
    before = PAGE.read_text(encoding="utf-8").partition(MARK)[0] if PAGE.exists() else ""
    PAGE.write_text(before + "\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
