"""What a search has come to, as values, a table and JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from veneer.files import write_json, write_text
from veneer.training.events import Event
from veneer.training.search.space import Value, in_words

State: TypeAlias = Literal["running", "complete", "pruned", "failed"]
TABLE, NUMBERS, PICTURE = "search.md", "search.json", "response.png"


@dataclass(frozen=True)
class TrialResult:
    """A trial: the values that it has, how it ended, and its evaluation losses by the per cent of
    its steps at which they were measured; the steps and tokens that it has learnt from, of
    `all_steps` that it has."""

    number: int
    values: Mapping[str, Value]
    state: State
    losses: Mapping[int, float] = field(default_factory=dict)
    steps: int = 0
    tokens: int = 0
    all_steps: int = 0

    @property
    def loss(self) -> float | None:
        """The lowest of its losses; None where none was measured."""
        return min(self.losses.values(), default=None)

    @property
    def name(self) -> str:
        """What its directory is called."""
        return f"{self.number:03}"


@dataclass(frozen=True)
class Cost:
    """What a search took, and what all its trials would have taken one after another to their ends.

    seconds: of the trials, from the first step to the end. tokens: that they learnt from;
    all_tokens: of all their steps. alone: tokens that a trial alone learns from in a second, as
    measured at the beginning of the search.
    """

    seconds: float
    tokens: int
    all_tokens: int
    alone: float | None

    @property
    def one_after_another(self) -> float | None:
        """Seconds of all trials to their ends, each alone; None where no speed is known."""
        return self.all_tokens / self.alone if self.alone else None

    def __str__(self) -> str:
        text = f"{self.tokens:,} tokens in {self.seconds:,.0f} s"
        if self.one_after_another is None:
            return text
        return (
            f"{text}. To their ends one after another the trials would have learnt from "
            f"{self.all_tokens:,}, in about {self.one_after_another:,.0f} s at the "
            f"{self.alone:,.0f} tokens/s that were measured of one alone"
        )


@dataclass(frozen=True)
class SearchResult:
    """All trials, the best first, and what they cost."""

    model: str
    data: str
    trials: Sequence[TrialResult]
    cost: Cost

    @property
    def best(self) -> TrialResult | None:
        """The complete trial with the lowest loss; None where none is complete."""
        complete = (t for t in self.trials if t.state == "complete" and t.loss is not None)
        return min(complete, key=lambda trial: trial.loss or 0.0, default=None)


@dataclass(frozen=True, slots=True)
class SearchBegun(Event):
    """A search begins, or goes on, that has at most so many trials, of which some have ended."""

    trials: int
    ended: int


@dataclass(frozen=True, slots=True)
class TrialBegun(Event):
    """A trial begins, or goes on."""

    trial: TrialResult


@dataclass(frozen=True, slots=True)
class TrialEnded(Event):
    """A trial has ended; why, where it failed."""

    trial: TrialResult
    why: str = ""


@dataclass(frozen=True, slots=True)
class Searched(Event):
    """The search has ended."""

    result: SearchResult


def ranked(trials: Iterable[TrialResult]) -> list[TrialResult]:
    """Return trials with the best first: those that came farther, and of these the lower losses."""
    order: dict[State, int] = {"complete": 0, "running": 1, "pruned": 2, "failed": 3}

    def key(trial: TrialResult) -> tuple[int, int, float]:
        loss = float("inf") if trial.loss is None else trial.loss
        return order[trial.state], -max(trial.losses, default=0), loss

    return sorted(trials, key=key)


def ending(trial: TrialResult) -> str:
    """Return how far a trial came, for a person."""
    at = f" at {max(trial.losses)} %" if trial.losses else ""
    return {
        "complete": "complete",
        "pruned": f"pruned{at}",
        "failed": "failed",
        "running": f"not ended{at}",
    }[trial.state]


def markdown(result: SearchResult) -> str:
    """Return the table of trials, the best first, and what the search cost."""
    names = list(dict.fromkeys(name for trial in result.trials for name in trial.values))
    lines = [
        f"# A search over {', '.join(names)}",
        "",
        f"{result.model} on {result.data}. {result.cost}.",
        "",
        f"| trial | {' | '.join(names)} | evaluation loss | steps | |",
        f"|{'---:|' * (len(names) + 3)}---|",
    ]
    for trial in result.trials:
        values = [in_words({"": trial.values[n]}).strip() for n in names if n in trial.values]
        loss = "" if trial.loss is None else f"{trial.loss:.4f}"
        values = [value.replace("|", r"\|") for value in values]  # of a pattern
        cells = [str(trial.number), *values, loss, f"{trial.steps:,}", ending(trial)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_result(result: SearchResult, out: Path) -> None:
    """Write search.md and search.json below `out`."""
    best = result.best
    numbers: dict[str, Any] = {
        "model": result.model,
        "data": result.data,
        "best": None if best is None else best.number,
        "cost": asdict(result.cost) | {"one_after_another": result.cost.one_after_another},
        "trials": [
            {**asdict(trial), "loss": trial.loss, "losses": [*trial.losses.items()]}
            for trial in result.trials
        ],
    }
    write_text(out / TABLE, markdown(result))
    write_json(out / NUMBERS, numbers)
