"""Which rate and which rank suit which data? Every rate with every rank on three data sets.

python -m bench.choosing --write

A grid of trials that train together to their ends (`veneer search --sampler grid --pruner none`).
The loss is the lowest of three evaluations on rows held out. `--write` puts tables and pictures on
docs/choosing.md. A grid that has ended is not trained again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import veneer
from bench.island import rows as island_rows
from veneer.cli.console import quieten_libraries
from veneer.cli.response import draw_response
from veneer.training.search.result import Searched, SearchResult

Kind = Literal["e2e", "demo", "chat"]
TITLES: dict[Kind, str] = {
    "e2e": "Restaurants described from key facts (E2E)",
    "demo": "Facts about an invented cuisine (the demo's)",
    "chat": "Chats with a system prompt about an invented archipelago",
}
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "choosing.md"
MARK = "<!-- measured: everything below is written by python -m bench.choosing --write -->"
SEED = 1  # of the generated rows
RATES, RANKS = (1e-4, 3e-4, 1e-3, 3e-3), (1, 8, 64)


def rows_of(kind: Kind, count: int, home: Path, e2e: Path) -> Path:
    """Return a file of at most so many rows of a kind."""
    home.mkdir(parents=True, exist_ok=True)
    file = home / f"{kind}-{count}.jsonl"
    if kind == "e2e":
        lines = e2e.read_text(encoding="utf-8").splitlines()[:count]
    elif kind == "demo":
        sys.path.insert(0, str(ROOT / "examples"))
        import cuisine

        lines = [json.dumps(row) for row in cuisine.training_rows()][:count]
    else:
        lines = [json.dumps(row) for row in island_rows("chat", count, seed=SEED)]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def grid(kind: Kind, asked: argparse.Namespace) -> SearchResult:
    """Train a rate with a rank, all of them, and return what became of each."""
    out = asked.out / kind
    course = veneer.TrainConfig(
        steps=asked.steps, tokens_per_step=asked.tokens, eval_every=max(1, asked.steps // 3)
    )
    recipe = veneer.Recipe(
        asked.model,
        rows_of(kind, asked.rows, asked.out, asked.e2e),
        lora=veneer.LoRA(targets="all"),
        training=course,
        rows=veneer.DataConfig(eval_rows=asked.eval_rows),
        out=out,
    )
    over = {"rank": asked.ranks, "lr": asked.rates}
    config = veneer.SearchConfig(trials=1000, sampler="grid", pruner="none")
    events = veneer.search(recipe, over, config, resume=(out / "study.db").exists())
    *_, (_, last) = events
    assert isinstance(last, Searched)
    return last.result


def table(result: SearchResult, rates: Sequence[float], ranks: Sequence[int]) -> str:
    """Return the losses, a line for each rank, the lowest in bold."""
    losses = {(t.values["rank"], t.values["lr"]): t.loss for t in result.trials}
    best = result.best
    lines = [f"| rank | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    lines.append(f"|---:|{'---:|' * len(rates)}")
    for rank in ranks:
        cells = []
        for rate in rates:
            loss = losses.get((rank, rate))
            text = "diverged" if loss is None else f"{loss:.3f}"
            is_best = best is not None and (rank, rate) == (best.values["rank"], best.values["lr"])
            cells.append(f"**{text}**" if is_best else text)
        lines.append(f"| {rank} | {' | '.join(cells)} |")
    return "\n".join(lines)


def given(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> Iterator[str]:
    """Yield the flags that differ from their defaults, but for places of a machine."""
    for name, value in vars(asked).items():
        if value != parser.get_default(name) and not isinstance(value, Path):
            yield f"--{name.replace('_', '-')}"
            values = value if isinstance(value, list) else [] if value is True else [value]
            yield from map(str, values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--e2e", type=Path, default=Path("../shared/data/e2e/train.jsonl"))
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=get_args(Kind))
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--eval-rows", type=int, default=60)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=500, help="of a step")
    parser.add_argument("--out", type=Path, default=Path("dist/choosing"))
    parser.add_argument("--write", action="store_true", help="onto docs/choosing.md")
    asked = parser.parse_args()
    quieten_libraries()
    command = " ".join(["python -m bench.choosing", *given(parser, asked)])
    sections = [
        f"{MARK}\n\n`{command}`: {asked.model}, LoRA on all linear layers, alpha twice the rank, "
        f"{asked.steps} steps of at most {asked.tokens} tokens. Columns are learning rates.\n"
    ]
    for kind in asked.kinds:
        result = grid(kind, asked)
        text = f"## {TITLES[kind]}\n\n{table(result, asked.rates, asked.ranks)}\n"
        print(text, flush=True)
        picture = asked.out / f"choosing-{kind}.png"
        draw_response(result, picture)
        if asked.write:
            shutil.copy(picture, PAGE.parent)
        sections.append(f"{text}\n![{TITLES[kind]}: loss against rate]({picture.name})\n")
    if asked.write:
        before = PAGE.read_text(encoding="utf-8").partition(MARK)[0] if PAGE.exists() else ""
        PAGE.write_text(before + "\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
