"""The tables of a comparison: a row for each label, over all its seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from veneer.compare.config import CompareConfig
from veneer.compare.job import Result
from veneer.compare.labels import BASE, Label
from veneer.compare.quality import Measure


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and its standard deviation where there are several."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the mean of `values` and their standard deviation (n - 1)."""
        return cls(mean(values), stdev(values) if len(values) > 1 else None)

    def text(self, digits: int, *, signed: bool = False) -> str:
        """Return 1.234 ± 0.012, with `digits` decimals."""
        shown = f"{self.mean:{'+' if signed else ''}.{digits}f}"
        return shown if self.deviation is None else f"{shown} ± {self.deviation:.{digits}f}"


@dataclass(frozen=True)
class Row:
    """One line of the table. None: not measured, or not for this row.

    peak      bytes at most while training, the process's own (a GPU's where there is one)
    forgotten change of the loss on the general sample, against the base as it is
    kept      bytes on the disk that this task alone needs
    together  whether its runs trained in passes with others, so that they have no time of their own
    errors    of runs that failed; a row may have both these and numbers
    """

    label: Label
    seeds: tuple[int, ...] = ()
    steps: int | None = None
    lr: float | None = None
    trained: int | None = None
    share: float | None = None
    tokens: float | None = None
    peak: int | None = None
    tokens_per_second: float | None = None
    minutes: float | None = None
    train_loss: Spread | None = None
    eval_loss: Spread | None = None
    quality: Spread | None = None
    forgotten: Spread | None = None
    kept: int | None = None
    base_unchanged: bool | None = None
    swappable: bool | None = None
    together: bool = False
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """All that a comparison measured.

    courses: steps and learning rate of each run. trials: evaluation losses by learning rate, where
    a range test was asked for, None where it diverged. errors: of the runs that failed.
    """

    model: str
    data: Path
    config: CompareConfig
    measure: Measure | None
    base: Result
    courses: dict[str, tuple[int, float]]
    results: dict[str, dict[int, Result]]
    errors: dict[str, list[str]]
    trials: dict[str, dict[float, float | None]]

    @property
    def failed(self) -> bool:
        """Whether any run came to nothing."""
        return bool(self.errors)

    @property
    def rows(self) -> list[Row]:
        """The first table: the base itself, and each method."""
        return [self._base(), *map(self._row, self.config.labels)]

    @property
    def swept(self) -> list[Row]:
        """The second table: ranks and targets."""
        return [self._row(label) for label in self.config.swept]

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values: settings, rows, and all runs but their answers."""

        def run(result: Result) -> dict[str, Any]:
            return {name: value for name, value in asdict(result).items() if name != "answers"}

        settings = asdict(self.config)
        for name in ("test", "general"):
            settings[name] = settings[name] and str(settings[name])
        return {
            "model": self.model,
            "data": str(self.data),
            "settings": settings,
            "measure": self.measure,
            "rows": [asdict(row) for row in self.rows],
            "swept": [asdict(row) for row in self.swept],
            "trials": self.trials,
            "base": run(self.base),
            "runs": {
                name: {str(seed): run(result) for seed, result in by_seed.items()}
                for name, by_seed in self.results.items()
            },
        }

    def _base(self) -> Row:
        return Row(
            BASE,
            eval_loss=Spread(self.base.eval_loss, None),
            quality=self._quality([self.base]),
            forgotten=Spread(0.0, None) if self.base.general_loss is not None else None,
        )

    def _row(self, label: Label) -> Row:
        by_seed = self.results.get(label.run, {})
        runs, errors = list(by_seed.values()), tuple(self.errors.get(label.run, ()))
        if not runs:
            return Row(label, errors=errors)
        steps, lr = self.courses[label.run]
        before = self.base.general_loss

        def spread(value: Callable[[Result], float | None]) -> Spread | None:
            values = [x for run in runs if (x := value(run)) is not None]
            return Spread.of(values) if values else None

        together = any(run.together > 1 for run in runs)

        def forgotten(run: Result) -> float | None:
            after = run.general_loss
            return None if after is None or before is None else after - before

        return Row(
            label,
            seeds=tuple(by_seed),
            steps=steps,
            lr=lr,
            trained=runs[0].trained,
            share=runs[0].trained / runs[0].base_parameters,
            tokens=mean(run.tokens for run in runs),
            peak=None if together else max((run.peak for run in runs if run.peak), default=None),
            tokens_per_second=None if together else mean(run.tokens_per_second for run in runs),
            minutes=None if together else mean(run.seconds for run in runs) / 60,
            together=together,
            train_loss=spread(lambda run: run.train_loss),
            eval_loss=spread(lambda run: run.eval_loss),
            quality=self._quality(runs),
            forgotten=spread(forgotten),
            kept=runs[0].kept,
            base_unchanged=all(run.base_unchanged for run in runs),
            swappable=all(run.swappable for run in runs),
            errors=errors,
        )

    def _quality(self, runs: Sequence[Result]) -> Spread | None:
        values = [run.bleu if self.measure == "bleu" else run.exact for run in runs]
        measured = [value for value in values if value is not None]
        return Spread.of(measured) if measured else None
