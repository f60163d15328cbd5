"""Does each recipe learn what it is for? Trains it, and asks questions that training never shows.

python -m bench.recipes                          all of recipes/, several minutes each
python -m bench.recipes extraction code --write  some, and their lines in recipes/README.md
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from recipes.family import Family

import veneer

HERE = Path(__file__).parents[1] / "recipes"
MODEL = "smollm2-135m"
NAMES = sorted(path.stem for path in HERE.glob("*.yaml"))
MARK = "<!-- measured: the table below is written by python -m bench.recipes --write -->"
HEAD = "| recipe | rows | asked | right before | right after |\n|---|---|---|---|---|\n"


def family_of(name: str) -> Family:
    return import_module(f"recipes.{name}").FAMILY


def command_of(name: str, out: Path) -> list[str]:
    """Return the arguments of `veneer` that train a recipe over the rows in its directory."""
    rows = out / f"{name}.jsonl"
    settings = HERE / f"{name}.yaml"
    placed = ["--out", str(out / "run"), "--force"]  # in place of an earlier measurement's
    return ["tune", MODEL, str(rows), "--config", str(settings), *placed]


def right(family: Family, base: veneer.Base, tokenizer: object) -> int:
    """Return how many of the test rows a model answers rightly, taking its likeliest tokens."""
    sampling = veneer.Sampling(max_new_tokens=family.new_tokens)
    asked = [row.messages() for row in family.test]
    answers = veneer.answers(base.model, tokenizer, asked, sampling=sampling)
    return sum(map(family.is_right, answers, family.test))


def measure(name: str, out: Path) -> str:
    """Train a recipe in a process of its own, score it, and return its line of the table."""
    family = family_of(name)
    family.write(out)
    subprocess.run([sys.executable, "-m", "veneer", *command_of(name, out)], check=True)
    base = veneer.load_base(MODEL)
    before = right(family, base, base.tokenizer)
    veneer.load(base.model, out / "run" / "lora_adapter", name=name, tokenizer=base.tokenizer)
    after = right(family, base, base.tokenizer)
    asked = len(family.test)
    return f"| {name} | {len(family.train)} | {asked} | {before} | {after} ({after / asked:.0%}) |"


def write(lines: dict[str, str]) -> None:
    """Put lines into the table of recipes/README.md, in place of earlier ones of these recipes."""
    page = HERE / "README.md"
    before, _, table = page.read_text(encoding="utf-8").partition(MARK)
    kept = {line.split("|")[1].strip(): line for line in table.splitlines() if line[:1] == "|"}
    kept = {name: line for name, line in kept.items() if name in NAMES} | lines
    rows = "".join(kept[name] + "\n" for name in sorted(kept))
    page.write_text(f"{before}{MARK}\n\n{HEAD}{rows}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="RECIPE", help=", ".join(NAMES))
    parser.add_argument("--write", action="store_true", help="write the table into the page")
    parser.add_argument("--out", type=Path, default=Path("dist/recipes"))
    asked = parser.parse_args()
    if unknown := sorted({*asked.names} - {*NAMES}):
        parser.error(f"no such recipe: {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    lines = {}
    for name in asked.names or NAMES:
        lines[name] = measure(name, asked.out / name)
        print(HEAD + lines[name], flush=True)
        if asked.write:
            write({name: lines[name]})


if __name__ == "__main__":
    main()
