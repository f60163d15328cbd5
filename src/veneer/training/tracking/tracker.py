"""What a tracker is, and how a run's events reach it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from veneer.training.events import Evaluated, Event, Notice, Step, Stopped, Verdict


class Tracker(Protocol):
    """A program that keeps numbers by step. Whatever it raises ends nothing but itself."""

    name: str

    def begin(self, settings: Mapping[str, Any]) -> None:
        """A run begins, with these settings."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers were measured at a step."""

    def end(self, outcome: str) -> None:
        """The run ended: finished, interrupted, diverged or failed."""


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


def tracked(
    events: Iterable[Event], trackers: Sequence[Tracker], settings: Mapping[str, Any]
) -> Iterator[Event]:
    """Pass events on, and give their numbers to trackers.

    A tracker that raises gets nothing more, which a Notice says once; the run goes on.
    """
    working = list(trackers)

    def each(call: str, *arguments: Any) -> Iterator[Notice]:
        for tracker in list(working):
            try:
                getattr(tracker, call)(*arguments)
            except Exception as error:  # of foreign libraries, whatever they raise
                working.remove(tracker)
                why = str(error).strip().partition("\n")[0] or type(error).__name__
                yield Notice(f"{tracker.name} failed and gets no more of this run: {why}")

    outcome = "finished"
    try:
        yield from each("begin", settings)
        for event in events:
            if isinstance(event, Step | Evaluated):
                yield from each("log", event.step, numbers_of(event))
            elif isinstance(event, Stopped) and event.reason == "interrupted":
                outcome = "interrupted"
            elif isinstance(event, Verdict) and event.kind == "diverged":
                outcome = "diverged"
            yield event
        yield from each("end", outcome)
        working.clear()
    except GeneratorExit:  # nobody takes the events any more
        raise
    except BaseException:
        outcome = "failed"
        raise
    finally:
        for _ in each("end", outcome):  # what it says has nowhere to go
            pass
