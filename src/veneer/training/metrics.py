"""A run's numbers and its progress, written into its directory as they happen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict

from veneer.run_directory import RunDirectory
from veneer.training.events import Evaluated, Event, Started, Step, Stopped, Trained, Verdict


def record(events: Iterable[Event], directory: RunDirectory) -> Iterator[Event]:
    """Pass events on, write steps and evaluations to the metrics, start and end to the progress.

    A run that goes on after step n keeps the lines up to n. An error that ends a run is written
    too, once the run has started: before that, the files may be another run's.
    """
    steps, ended, where = 0, "finished", ""  # 0: not started
    verdict: dict[str, str] = {}
    try:
        for event in events:
            match event:
                case Started():
                    steps = event.steps
                    directory.cut_metrics(event.done)
                    directory.write_progress(steps=steps)
                case Step() | Evaluated():
                    line = asdict(event)
                    line.pop("best", None)
                    before = "eval_" if isinstance(event, Evaluated) else ""
                    line |= {before + name: x for name, x in line.pop("metrics").items()}
                    directory.append_metrics(line)
                case Stopped():
                    directory.write_progress(steps=steps, ended=event.reason)
                case Verdict(kind, text):
                    verdict = {"verdict": text}
                    ended = "diverged" if kind == "diverged" else ended
                case Trained():
                    where = "After the training: "
                    directory.write_progress(steps=steps, ended=ended, **verdict)
            yield event
    except Exception as error:
        if steps:
            with suppress(OSError):  # the disk may be full, and that the very error
                why = where + (str(error) or type(error).__name__)
                directory.write_progress(steps=steps, ended="failed", **verdict, why=why)
        raise
