"""A run whose steps are read while the next ones are computed, as on a GPU, is the same run."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import veneer
from support.random_adapters import examples, same, trained_weights
from support.runs import COURSE, ROWS, new_model, of
from training.test_skips import spoil
from veneer.training import run as running
from veneer.training.events import Event, Skipped, Step, Stopped

HELD_OUT = examples([12, 5], seed=8)
LONG = replace(COURSE, steps=9, eval_every=4, save_every=3, clip=1.0)
MEASURED = ("seconds", "rss_bytes")  # other ones in each run


def events_of(late: bool, monkeypatch: Any, directory: Path, **options: Any) -> Any:
    """Run, and return the events without what is measured, the model's weights, and the files."""
    monkeypatch.setattr(running, "reads_late", lambda device: late)
    model = new_model(dropout=0.1)
    course = options.pop("course", LONG)
    directory.mkdir(exist_ok=True)
    monkeypatch.chdir(directory)
    options |= {"held_out": HELD_OUT, "directory": Path("run")}
    events = list(veneer.train(model, ROWS, course, **options))
    plain = [
        (type(event).__name__, {k: v for k, v in asdict(event).items() if k not in MEASURED})
        for event in events
    ]
    files = {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    return plain, (trained_weights(model), files), events


def assert_same(monkeypatch: Any, tmp_path: Path, **options: Any) -> list[Event]:
    plain, (weights, files), events = events_of(False, monkeypatch, tmp_path / "now", **options)
    late, (their_weights, their_files), _ = events_of(
        True, monkeypatch, tmp_path / "late", **options
    )
    assert late == plain
    assert same(their_weights, weights)
    assert their_files == files
    return events


@pytest.mark.parametrize("save_every", [None, 3])
def test_events_weights_and_files(save_every, monkeypatch, tmp_path):
    course = replace(LONG, save_every=save_every)
    events = assert_same(monkeypatch, tmp_path, course=course)
    assert [event.step for event in of(Step, events)] == list(range(1, 10))


def test_steps_that_are_not_finite(monkeypatch, tmp_path):
    def when(number: int, batch: Any) -> bool:
        return number % 9 in (2, 3, 6)  # the same passes in both runs

    spoil(monkeypatch, when)
    events = assert_same(monkeypatch, tmp_path)
    assert [event.step for event in of(Skipped, events)] == [3, 4, 7]


def test_a_run_that_diverges(monkeypatch, tmp_path):
    spoil(monkeypatch, lambda number, batch: number >= 2, math.inf)
    with pytest.raises(veneer.TrainingError, match="3 steps in a row, up to step 5"):
        events_of(True, monkeypatch, tmp_path)


def test_going_on_from_a_late_checkpoint(monkeypatch, tmp_path):
    whole, (weights, _), _ = events_of(False, monkeypatch, tmp_path / "whole")
    asked = iter([False] * 4 + [True])
    events_of(True, monkeypatch, tmp_path / "late", should_stop=lambda: next(asked))
    rest, (their_weights, _), _ = events_of(True, monkeypatch, tmp_path / "late", resume=True)
    steps = [event for event in whole if event[0] == "Step"]
    assert [event for event in rest if event[0] == "Step"] == steps[5:]
    assert same(their_weights, weights)


def test_stopping_ends_with_the_step_that_was_begun(monkeypatch, tmp_path):
    asked = iter([False, False, True])
    *_, events = events_of(True, monkeypatch, tmp_path / "late", should_stop=lambda: next(asked))
    assert [event.step for event in of(Step, events)] == [1, 2, 3]
    assert of(Stopped, events) == [Stopped(3, "interrupted")]
