"""How a search goes: a frozen, validated value that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from veneer.checks import ABOVE_0, FRACTION, check_config, one_of, whole_number

Sampler = Literal["tpe", "random", "grid"]
Pruner = Literal["halving", "median", "none"]


@dataclass(frozen=True)
class SearchConfig:
    """How a search goes. Raises ConfigError, which lists everything that is wrong."""

    trials: int = 24
    """Trials in all, those included that end early."""
    together: int = 8
    """Trials that train at a time, in passes that they share."""
    share: float = 1.0
    """Part of a run's steps that a trial makes, with a schedule as long as that: shorter trials
    cost less, and prefer higher rates than a whole run does."""
    minutes: float | None = None
    """Begin no trial after so many minutes; those that train go on to their ends."""
    sampler: Sampler = "tpe"
    """Who draws the settings of a trial: Optuna's tpe, which learns from the trials before it;
    random; or grid, all combinations of values in their order."""
    pruner: Pruner = "halving"
    """Which trials end early, none of them before its eighth step: those that are not of the best
    third so far, rounded up, at a ninth and at a third of their steps (halving; where the shortest
    trial has fewer than 67 steps at a third alone, than 24 at two thirds alone, than 12 never);
    those worse than the median of the others at any ninth of them (median); or none."""

    def __post_init__(self) -> None:
        check_config(
            self,
            opening="There can be no such search",
            rules={
                "trials": whole_number(1),
                "together": whole_number(1),
                "share": FRACTION,
                "minutes": ABOVE_0,
                "sampler": one_of(Sampler),
                "pruner": one_of(Pruner),
            },
        )
