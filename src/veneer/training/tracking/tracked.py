"""A run's events on their way through, with their numbers given to trackers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from veneer.errors import VeneerWarning
from veneer.training.events import Evaluated, Event, Notice, Step, Stopped, Verdict
from veneer.training.tracking.sender import Sender
from veneer.training.tracking.tracker import Point, Tracker, numbers_of

PATIENCE = 60.0  # seconds that the end of a run waits for its trackers


def tracked(
    events: Iterable[Event], trackers: Sequence[Tracker], settings: Mapping[str, Any]
) -> Iterator[Event]:
    """Pass events on, and give their numbers to trackers.

    The run never waits for a tracker, but at its end, PATIENCE seconds at most. A tracker that
    fails or hangs gets nothing more, which a Notice says once; the run goes on.
    """
    senders = [Sender(tracker, settings) for tracker in trackers]
    outcome = "finished"
    try:
        for event in events:
            if isinstance(event, Step | Evaluated):
                point = Point(event.step, time.time(), numbers_of(event))
                for sender in senders:
                    sender.log(point)
            elif isinstance(event, Stopped) and event.reason == "interrupted":
                outcome = "interrupted"
            elif isinstance(event, Verdict) and event.kind == "diverged":
                outcome = "diverged"
            yield from map(Notice, _problems(senders))
            yield event
        _end(senders, outcome)
        yield from map(Notice, _problems(senders))
    except GeneratorExit:  # nobody takes the events any more
        outcome = "interrupted"
        raise
    except BaseException:
        outcome = "failed"
        raise
    finally:
        _end(senders, outcome)
        for problem in _problems(senders):  # nobody takes events any more
            warnings.warn(problem, VeneerWarning, stacklevel=2)


def _problems(senders: list[Sender]) -> list[str]:
    """Return the problems of senders, which are taken from the list for good."""
    failed = [sender for sender in senders if sender.problem]
    for sender in failed:
        senders.remove(sender)
    return [f"{each.name} failed and gets no more of this run: {each.problem}" for each in failed]


def _end(senders: Iterable[Sender], outcome: str) -> None:
    """Let trackers end, and wait for them."""
    for sender in senders:
        sender.end(outcome)
    until = time.monotonic() + PATIENCE
    for sender in senders:
        sender.wait(until - time.monotonic())
