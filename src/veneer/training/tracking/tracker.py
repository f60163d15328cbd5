"""What a tracker is, and what of a run's events it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from veneer.training.events import Evaluated, Step


@dataclass(frozen=True)
class Point:
    """Numbers by name, the step that they were measured at, and when that was (time.time())."""

    step: int
    time: float
    numbers: Mapping[str, float]


class Tracker(Protocol):
    """A program that keeps numbers by step. One thread calls it, and whatever it raises ends
    nothing but itself."""

    name: str

    def begin(self, settings: Mapping[str, Any]) -> None:
        """A run begins, with these settings."""

    def log(self, points: Sequence[Point]) -> None:
        """Numbers were measured."""

    def end(self, outcome: str) -> None:
        """The run ended: finished, interrupted, diverged or failed. Return when all is kept."""


def numbers_of(event: Step | Evaluated) -> dict[str, float]:
    """Return the numbers that trackers keep of an event, by their names there."""
    if isinstance(event, Step):
        kind = "train"
        numbers = {
            "train/loss": event.loss,
            "train/learning_rate": event.lr,
            "speed/tokens_per_second": event.tokens / event.seconds,
            "memory/resident_bytes": float(event.rss_bytes),
        }
    else:
        kind = "eval"
        numbers = {"eval/loss": event.eval_loss}
        if event.perplexity is not None:
            numbers["eval/perplexity"] = event.perplexity
    return numbers | {f"{kind}/{name}": value for name, value in event.metrics.items()}
