"""Does a search find more than as much processor time spent on random trials, one after another?

python -m bench.search --kinds e2e demo --seeds 0 1 2

The random trials are drawn from the same ranges and train one after another, each alone and to its
end. The search begins with what `veneer tune` chooses and is stopped when it has taken as much
processor time as they have, if it has not ended before; the base's loading counts for neither.
Compared are the lowest evaluation losses of trials that came to their ends. Each run is one line of
the results, and is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, get_args

import veneer
from bench.choosing import Kind, rows_of
from veneer.cli.console import quieten_libraries
from veneer.training.events import Evaluated, Started, Written
from veneer.training.search.space import with_values

RATES, RANKS, TARGETS = (1e-4, 1e-2), (4, 8, 16, 64), ("attention", "all")
# So few that the best come to their ends within the time of eight whole ones.
TRIALS, TOGETHER = 14, 4
OVER = {"lr": f"{RATES[0]}..{RATES[1]}", "rank": RANKS, "targets": TARGETS}


class Taken:
    """Processor time since the first trial's beginning, and the lowest evaluation loss of trials
    that have ended."""

    def __init__(self) -> None:
        self.begun: float | None = None
        self.losses: dict[str, float] = {}  # of all trials, by name
        self.ended: list[str] = []

    def take(self, name: str, event: Any) -> None:
        if isinstance(event, Started) and self.begun is None:
            self.begun = time.process_time()
        elif isinstance(event, Evaluated) and event.step:
            self.losses[name] = min(self.losses.get(name, math.inf), event.eval_loss)
        elif isinstance(event, Written):
            self.ended.append(name)

    @property
    def loss(self) -> float:
        return min((self.losses[name] for name in self.ended), default=math.inf)

    @property
    def seconds(self) -> float:
        return 0.0 if self.begun is None else time.process_time() - self.begun


def at_random(recipe: veneer.Recipe, count: int, seed: int) -> dict[str, Any]:
    """Train random trials one after another, each to its end."""
    random = Random(seed)
    low, high = map(math.log, RATES)
    waiting: list[tuple[str, veneer.Recipe]] = []
    for number in range(count):
        values: Mapping[str, Any] = {
            "lr": math.exp(random.uniform(low, high)),
            "rank": random.choice(RANKS),
            "targets": random.choice(TARGETS),
        }
        own = replace(with_values(recipe, values), out=recipe.out / str(number))
        waiting.append((str(number), own))
    taken = Taken()
    first = dict([waiting.pop(0)])

    def next_one() -> dict[str, veneer.Recipe]:
        done = len(taken.ended) == count - len(waiting)
        return dict([waiting.pop(0)]) if waiting and done else {}

    for name, event in veneer.tune_many(first, joining=next_one, merges=False):
        taken.take(name, event)
    return {"loss": taken.loss, "seconds": taken.seconds, "trials": len(taken.ended)}


def searched(recipe: veneer.Recipe, seconds: float) -> dict[str, Any]:
    """Search for as long, and return what is found by then."""
    taken = Taken()
    config = veneer.SearchConfig(trials=TRIALS, together=TOGETHER)
    result = None
    events = veneer.search(recipe, OVER, config, should_stop=lambda: taken.seconds >= seconds)
    for name, event in events:
        taken.take(name, event)
        result = event
    trials = result.result.trials
    whole = sum(trial.state == "complete" for trial in trials)
    return {"loss": taken.loss, "seconds": taken.seconds, "trials": len(trials), "whole": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--e2e", type=Path, default=Path("../shared/data/e2e/train.jsonl"))
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=["e2e", "demo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--eval-rows", type=int, default=60)
    parser.add_argument("--trials", type=int, default=8, help="at random, one after another")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=500, help="of a step")
    parser.add_argument("--out", type=Path, default=Path("dist/bench-search"))
    asked = parser.parse_args()
    quieten_libraries()
    asked.out.mkdir(parents=True, exist_ok=True)
    results = asked.out / "results.jsonl"
    earlier = map(json.loads, results.read_text().splitlines() if results.exists() else ())
    measured = {json.dumps(line["run"]): line["measured"] for line in earlier}
    print("| data | seed | random: loss | trials | search: loss | trials | whole | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for kind in asked.kinds:
        for seed in asked.seeds:
            recipe = veneer.Recipe(
                asked.model,
                rows_of(kind, asked.rows, asked.out, asked.e2e),
                training=veneer.TrainConfig(  # the seed chooses the rows held out, for both ways
                    steps=asked.steps, tokens_per_step=asked.tokens, seed=seed
                ),
                rows=veneer.DataConfig(eval_rows=asked.eval_rows),
                out=asked.out / "run",
            )
            both = {}
            for way in ("random", "search"):
                sizes = asked.rows, asked.eval_rows, asked.steps, asked.tokens
                key = [asked.model, kind, seed, *sizes, way]
                if (name := json.dumps(key)) not in measured:
                    shutil.rmtree(recipe.out, ignore_errors=True)
                    measured[name] = (
                        at_random(recipe, asked.trials, seed)
                        if way == "random"
                        else searched(recipe, both["random"]["seconds"])
                    )
                    with results.open("a") as file:
                        file.write(json.dumps({"run": key, "measured": measured[name]}) + "\n")
                both[way] = measured[name]
            one, other = both["random"], both["search"]
            print(
                f"| {kind} | {seed} | {one['loss']:.4f} | {one['trials']} | {other['loss']:.4f} "
                f"| {other['trials']} | {other['whole']} "
                f"| {one['seconds']:.1f}, {other['seconds']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
