"""Answers and their rewards as values, and the faults of what judges them. Imports no torch."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from veneer.errors import TrainingError, shortened

OnFault = Literal["skip", "stop"]
FaultKind = Literal["raised", "timed out", "not a finite number"]


@dataclass(frozen=True)
class Answered:
    """An answer to be judged.

    messages: the turns that it answers, each with a role and a content. references: answers, or
    tests, that the row brings. item: the row's fields. place: which row asks, for messages.
    """

    text: str
    messages: Sequence[Mapping[str, str]] = ()
    references: Sequence[str] = ()
    item: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""

    @property
    def prompt(self) -> str:
        """The text of the last turn before the answer."""
        return self.messages[-1]["content"] if self.messages else ""


class RewardFault(Exception):
    """Why an answer has no reward of some kind."""

    def __init__(self, kind: FaultKind, message: str) -> None:
        super().__init__(message)
        self.kind: FaultKind = kind


class Reward(Protocol):
    """One thing by which answers are judged. A call raises RewardFault where it gives no number."""

    @property
    def name(self) -> str: ...

    def __call__(self, answer: Answered) -> float: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Weighted:
    """A reward, and its factor in the sum."""

    reward: Reward
    weight: float = 1.0


@dataclass(frozen=True)
class Judged:
    """What answers are worth: the weighted sum for each, NaN where one of the rewards has failed.

    by_name: of each reward, before its weight. faults: how often each reward failed in which way,
    by "NAME KIND", and `first_fault` what the first one said. seconds: that judging took.
    """

    rewards: list[float]
    by_name: Mapping[str, list[float]]
    faults: Mapping[str, int] = field(default_factory=dict)
    first_fault: str = ""
    seconds: float = 0.0

    def replaced(self, places: Sequence[int], others: Judged) -> Judged:
        """Return what answers are worth once others stand in these places; the faults of both."""

        def merged(own: Sequence[float], new: Sequence[float]) -> list[float]:
            at = dict(zip(places, new, strict=True))
            return [at.get(i, value) for i, value in enumerate(own)]

        return Judged(
            merged(self.rewards, others.rewards),
            {name: merged(own, others.by_name[name]) for name, own in self.by_name.items()},
            Counter(self.faults) + Counter(others.faults),
            self.first_fault or others.first_fault,
            self.seconds + others.seconds,
        )


def judge(
    answers: Sequence[Answered], rewards: Sequence[Weighted], *, on_fault: OnFault = "skip"
) -> Judged:
    """Return what answers are worth: Σ weight · reward.

    An answer for which a reward raises, hangs or is not finite counts for nothing; with
    `on_fault="stop"` it raises TrainingError instead.
    """
    begun = time.perf_counter()
    totals = [0.0] * len(answers)
    by_name: dict[str, list[float]] = {}
    faults: Counter[str] = Counter()
    first_fault = ""
    for weighted in rewards:
        name = weighted.reward.name
        values = by_name[name] = []
        for i, answer in enumerate(answers):
            value = math.nan
            try:
                value = _finite(weighted.reward(answer))
            except RewardFault as fault:
                faults[f"{name} {fault.kind}"] += 1
                where = f" for an answer to {answer.place}" if answer.place else ""
                what = f"The reward {name} {fault.kind}{where}: {shortened(str(fault), 400)}"
                first_fault = first_fault or what
                if on_fault == "stop":
                    raise TrainingError(
                        f"{what} Mend it and go on by --resume, or let such answers count for "
                        "nothing: --on-reward-fault skip."
                    ) from fault
            values.append(value)
            totals[i] += weighted.weight * value
    return Judged(totals, by_name, dict(faults), first_fault, time.perf_counter() - begun)


def _finite(value: float) -> float:
    """Return a reward. Raises RewardFault for infinity and NaN."""
    if not math.isfinite(value):
        raise RewardFault("not a finite number", f"it returned {value!r}.")
    return value
