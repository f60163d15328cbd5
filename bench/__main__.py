"""`make bench`: every question in turn, and the answers on docs/performance.md."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import torch

from bench.shapes import SHAPES

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
MARK = "<!-- measured: everything below is written by make bench -->"
MODEL = "SmolLM2-135M, rank 8, all linear layers."
QUESTIONS = (
    (
        "Do the gradients agree with PEFT's?",
        ("-m bench.agreement --dtype float32", "-m bench.agreement --dtype bf16"),
    ),
    (
        "dense: 8 × 256 random tokens a step, every label counts, bfloat16",
        (
            "-m bench.training dense --rounds 3 "
            "--engines veneer,veneer-selective,veneer-full,peft,loralib",
        ),
    ),
    (
        "dense over the shapes that people tune, with random weights (bench/shapes.py)",
        tuple(
            f"-m bench.training dense --rounds 3 --steps 5 --engines veneer,peft --model {shape}"
            for shape in SHAPES
        ),
    ),
    (
        "dense over a base in 4 bits (NF4), beside PEFT over bitsandbytes",
        ("-m bench.training dense --rounds 3 --engines veneer,veneer-nf4,veneer-int8,peft-nf4",),
    ),
    ("Does a run take the memory that was planned for it?", ("-m bench.planned",)),
    (
        "sft: one epoch of questions and answers, 8 rows a step, bfloat16",
        ("-m bench.training sft --steps 0 --engines veneer,peft,trl",),
    ),
    (
        "short: 1 × 64 random tokens a step, bfloat16",
        ("-m bench.training short --rounds 3 --steps 20 --engines veneer,peft",),
    ),
    (
        "long: 1 × 2048 random tokens a step, bfloat16",
        ("-m bench.training long --rounds 3 --engines veneer,peft",),
    ),
    (
        "dense in float32",
        ("-m bench.training dense --dtype float32 --rounds 2 --engines veneer,peft",),
    ),
    ("Frozen products in 8 bits", ("-m bench.int8",)),
    (
        "Many adapters over one base, and single answers",
        (
            "-m bench.serving",
            "-m bench.serving --model qwen3-0.6b --resident 16",
            "-m bench.serving --model gemma3-270m --resident 16",
        ),
    ),
    ("A conversation in which the base and an adapter take turns", ("-m bench.activated",)),
    ("Adapters of different rows in a layer of their own", ("-m bench.mixed_products",)),
    ("Loading an adapter, and swapping", ("-m bench.loading",)),
    (
        "Two trainings side by side, and MiniGPT's pretraining",
        (
            "-m bench.neighbours steps",
            "-m bench.neighbours steps --model minigpt --seconds 5 "
            "--settings GOMP_SPINCOUNT=300000,threads=2 GOMP_SPINCOUNT=5000,threads=1",
            "-m bench.neighbours pretrain --rounds 1",
        ),
    ),
)


def features() -> str:
    """Return what decides speed here: cores and the processor's units for matrix products."""
    flags = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    )
    units = [
        name
        for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
        if f" {name}" in flags
    ]
    return f"{torch.get_num_threads()} threads, {', '.join(units)}, torch {torch.__version__}"


def main() -> None:
    sections = [f"{MARK}\n\nMachine: {platform.machine()}, {features()}. {MODEL}\n"]
    for question, commands in QUESTIONS:
        sections.append(f"### {question}\n")
        for command in commands:
            done = subprocess.run(
                [sys.executable, *command.split()], text=True, capture_output=True, check=False
            )
            if not done.stdout:  # a failed bound is an answer too, and printed
                sys.exit(done.stdout + done.stderr[-4000:])
            print(done.stdout, flush=True)
            sections.append(f"`python {command}`\n\n{done.stdout}")
    before = PAGE.read_text(encoding="utf-8").partition(MARK)[0] if PAGE.exists() else ""
    PAGE.write_text(before + "\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
