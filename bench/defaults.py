"""How near does a default run come to a searched one? Held-out loss on rows of three kinds.

python -m bench.defaults --rows 30 300 3000 --kinds qa chat text --search

Each run is one line of the results, and is not done again. A search is judged by its best epoch on
the very rows that judge it, so that it is rather too good.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import veneer
from bench.island import Kind, rows
from veneer.adapter.virtual_context import context_left
from veneer.cli.console import quieten_libraries
from veneer.data.encode import Example
from veneer.data.packing import split_held_out
from veneer.fused.forward import choose_forward
from veneer.kernels.heap import kept_heap
from veneer.models.load import Base
from veneer.training.choose import choose, hidden_size_of, rows_to_hold_out
from veneer.training.evaluate import evaluate
from veneer.training.events import Evaluated, Step

SEED, JUDGING_SEED, JUDGING_ROWS = 1, 99, 60
TARGETS = ("attention", "all")
# What a search tries, as multiples of what is chosen.
RATES, TOKENS, EPOCHS = (0.5, 1.0, 2.0, 4.0), (1.0, 4.0), (1.0,)


@dataclass(frozen=True)
class Bench:
    """A base in memory, and the file that keeps what was measured over it."""

    base: Base
    results: Path
    home: Path

    def examples(self, kind: Kind, count: int, seed: int) -> list[Example]:
        file = self.home / f"{kind}-{count}-{seed}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(kind, count, seed=seed)))
        longest = min(1024, context_left(self.base.model.config, 0) or 1024)
        return veneer.load_examples(file, self.base.tokenizer, max_length=longest)[0]

    def earlier(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return what was measured for `key` earlier, None where nothing was."""
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        results = map(json.loads, lines)
        return next((result["measured"] for result in results if result["run"] == key), None)

    def once(self, key: dict[str, Any], measure: Any) -> dict[str, Any]:
        """Return what was measured for `key`, now or earlier."""
        if (measured := self.earlier(key)) is not None:
            return measured
        begin = time.monotonic()
        measured = {**measure(), "seconds": round(time.monotonic() - begin, 1)}
        with self.results.open("a") as file:
            file.write(json.dumps({"run": key, "measured": measured}) + "\n")
        return measured

    def loss(self, judging: list[Example]) -> float:
        with kept_heap():
            return evaluate(self.base.model, judging, choose_forward(self.base.model, judging)[0])

    def trained(
        self,
        training: list[Example],
        held_out: list[Example],
        judging: list[Example],
        course: veneer.TrainConfig,
        targets: str,
    ) -> dict[str, Any]:
        """Train an adapter, and return the loss on the rows that judge, and the best of its epochs
        where these are held out too."""
        veneer.attach(self.base.model, veneer.LoRA(targets=targets), seed=course.seed)
        try:
            events = list(veneer.train(self.base.model, training, course, held_out=held_out))
            losses = [event.eval_loss for event in events if isinstance(event, Evaluated)]
            steps = sum(isinstance(event, Step) for event in events)
            return {"loss": self.loss(judging), "epochs": losses, "steps": steps}
        finally:
            veneer.detach(self.base.model)


def compared(bench: Bench, kind: Kind, count: int, asked: argparse.Namespace) -> list[str]:
    """Return the cells of a row of the table."""
    examples = bench.examples(kind, count, SEED)
    judging = bench.examples(kind, JUDGING_ROWS, JUDGING_SEED)
    where = {"model": bench.base.name, "kind": kind, "rows": count}
    before = bench.once({**where, "run": "base"}, lambda: {"loss": bench.loss(judging)})["loss"]

    held = rows_to_hold_out(count)
    split = split_held_out(count, eval_rows=held, seed=0) if held else (range(count), [])
    training, held_out = ([examples[i] for i in indices] for indices in split)
    usual = choose(
        veneer.TrainConfig(),
        [len(row.tokens) for row in training],
        what_trains=veneer.LoRA(),
        hidden_size=hidden_size_of(bench.base.model.config),
    )
    key = {**where, "run": "default", "held_out": held, **_named(usual)}
    run = bench.once(key, lambda: bench.trained(training, held_out, judging, usual, "attention"))
    after, best = run["loss"], None
    cells = [kind, f"{count:,}", _in_words(usual), f"{before:.3f}", f"{after:.3f}"]
    assert usual.lr
    assert usual.tokens_per_step
    assert usual.epochs
    for targets, rate, tokens, epochs in product(
        asked.targets, asked.rates, asked.tokens, asked.epochs
    ):
        course = replace(
            usual,
            lr=float(f"{usual.lr * rate:.2g}"),
            tokens_per_step=round(usual.tokens_per_step * tokens),
            epochs=max(1.0, round(usual.epochs * epochs)),
        )
        key = {**where, "run": "search", "targets": targets, **_named(course)}
        measured = bench.earlier(key)
        if measured is None and asked.search:
            measured = bench.once(
                key, lambda c=course, t=targets: bench.trained(examples, judging, judging, c, t)
            )
        if measured is not None and (best is None or measured["loss"] < best[0]):
            best = (measured["loss"], f"{targets}, {_in_words(course)}")
    if best is None:
        return [*cells, "", "", ""]
    share = (before - after) / (before - min(best[0], after))
    return [*cells, f"{best[0]:.3f}", best[1], f"{share:.0%}"]


def _named(course: veneer.TrainConfig) -> dict[str, Any]:
    return {name: getattr(course, name) for name in ("epochs", "tokens_per_step", "lr")}


def _in_words(course: veneer.TrainConfig) -> str:
    return f"{course.epochs:g} epochs, {course.tokens_per_step:,} tokens a step, {course.lr:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=[30, 300, 3000])
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=get_args(Kind))
    parser.add_argument("--search", action="store_true", help="search too, not only show it")
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    for name, factors in (("rates", RATES), ("tokens", TOKENS), ("epochs", EPOCHS)):
        parser.add_argument(f"--{name}", type=float, nargs="+", default=factors)
    parser.add_argument("--out", type=Path, default=Path("dist/defaults"))
    asked = parser.parse_args()
    quieten_libraries()
    asked.out.mkdir(parents=True, exist_ok=True)
    base = veneer.load_base(asked.model, dtype=asked.dtype)
    bench = Bench(base, asked.out / "results.jsonl", asked.out)
    titles = "data, rows, chosen, base, default, searched, by, share of the searched gain"
    print(f"| {' | '.join(titles.split(', '))} |\n|{'---|' * 8}")
    for count, kind in product(asked.rows, asked.kinds):
        print(f"| {' | '.join(compared(bench, kind, count, asked))} |", flush=True)


if __name__ == "__main__":
    main()
