"""A run's numbers and its progress, written into its directory as they happen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict

from veneer.run_directory import RunDirectory
from veneer.training.events import Evaluated, Event, Started, Step, Stopped, Trained


def record(events: Iterable[Event], directory: RunDirectory) -> Iterator[Event]:
    """Pass events on, write steps and evaluations to the metrics, start and end to the progress.

    A run that goes on after step n keeps the lines up to n.
    """
    steps = 0
    for event in events:
        match event:
            case Started():
                steps = event.steps
                directory.cut_metrics(event.done)
                directory.write_progress(steps=steps)
            case Step() | Evaluated():
                line = asdict(event)
                line.pop("best", None)
                directory.append_metrics(line)
            case Stopped():
                directory.write_progress(steps=steps, ended=event.reason)
            case Trained():
                directory.write_progress(steps=steps, ended="finished")
        yield event
