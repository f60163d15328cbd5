"""Each command that writes, on small bases, for `faults.Case`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import veneer
from support import faulty_server, warm
from support.faults import PROGRAM, Command
from support.random_adapters import shake, tokenizer
from support.tiny_models import tiny
from veneer.formats.merged import write_model

TRAINING = ("--steps", "4", "--save-every", "2", "--rank", "2", "--lr", "0.01", "--quiet")
TRAINING += ("--dtype", "float32")  # which would else be found out by measuring
RUN = ("out/lora_adapter", "out/lora_merged")
ROWS = [{"prompt": "a b c d"[: 1 + i % 7], "completion": "efghijklm"[i % 5 :]} for i in range(12)]


def write_inputs(home: Path) -> None:
    """Write what all commands read: two bases, adapters over the first, and rows."""
    for architecture in ("llama", "minigpt"):
        write_model(tiny(architecture), tokenizer(), home / architecture)
    for seed, name in enumerate(("a", "b"), 1):
        model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets="all"), seed=seed)
        veneer.save(shake(model, seed=seed), home / name, tokenizer=tokenizer())
    tuned = veneer.merge(shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets="all"))))
    write_model(tuned, tokenizer(), home / "tuned")
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    (home / "rows.jsonl").write_text(rows, encoding="utf-8")


def commands(home: Path) -> dict[str, Command]:
    """Return the commands, by name. home: what `write_inputs` has written."""
    llama, a, b, tuned = (str(home / name) for name in ("llama", "a", "b", "tuned"))

    def to(out: str, *arguments: str) -> Callable[[Path], list[str]]:
        return lambda disk: [str(disk / out) if word == "OUT" else word for word in arguments]

    def tune(base: str, *flags: str) -> Callable[[Path], list[str]]:
        rows = str(home / "rows.jsonl")
        return to("out", "tune", str(home / base), rows, "--out", "OUT", *TRAINING, *flags)

    def go_on(disk: Path) -> list[str]:
        return tune("llama", *(["--resume"] if (disk / "out").exists() else []))(disk)

    def convert(format: str, out: str = "out") -> Command:
        flags = ["--base", llama] if format == "gguf" else []
        arguments = to(out, "convert", a, "OUT", "--to", format, "--force", *flags)
        return Command(f"convert to {format}", arguments, (out,))

    listed = [
        Command("merge", to("out", "merge", llama, a, "OUT", "--accept-loss"), ("out",)),
        convert("peft"),
        convert("mlx"),
        convert("gguf", "out.gguf"),
        Command(
            "convert, replacing",
            to("out", "convert", b, "OUT", "--to", "native", "--force"),
            ("out",),
            before=partial(_copied, home / "a", "out"),
        ),
        Command("quantize", to("out", "quantize", llama, "OUT"), ("out",), marker="config.json"),
        Command("combine", to("out", "combine", a, b, "OUT"), ("out",)),
        Command("extract", to("out", "extract", llama, tuned, "OUT", "--rank", "2"), ("out",)),
        Command("pretrain", to("out", "pretrain", "OUT", "--steps", "1"), ("out",)),
        Command("tune", tune("llama"), RUN, again=go_on),
        Command(
            "tune, replacing",
            tune("llama", "--force", "--seed", "1"),
            RUN,
            before=partial(_tuned, home),
        ),
        Command(
            "serve: files and jobs",
            to("runs", "OUT"),
            faulty_server.KEPT,
            program=faulty_server.__name__,
            look=faulty_server.look,
        ),
    ]
    return {command.name: command for command in listed}


def _copied(source: Path, name: str, disk: Path) -> None:
    shutil.copytree(source, disk / name)


def _tuned(home: Path, disk: Path) -> None:
    arguments = [str(home / "llama"), str(home / "rows.jsonl"), "--out", str(disk / "out")]
    command = [warm.executable(), "-m", PROGRAM, "tune", *arguments, *TRAINING]
    subprocess.run(command, check=True, env=os.environ | {"VENEER_CACHE": str(disk / "cache")})


NAMES = tuple(commands(Path()))
