"""What a run writes into its directory while it goes, and reads from there when it goes on."""

import json
from collections.abc import Iterator
from dataclasses import asdict

import pytest

import veneer
from support.random_adapters import examples
from support.tiny_models import tiny
from veneer.run_directory import RunDirectory
from veneer.training.events import Evaluated, Event, Started, Step, Stopped, Trained, Verdict
from veneer.training.metrics import record

ROWS = examples([11, 7, 16, 9])


def some_events(steps: range, done: int) -> list[Event]:
    events: list[Event] = [Started(10, done)]
    for step in steps:
        events.append(Step(step, 1.0 / step, 0.1, 30, 20, 0.5, 100, {"margin": 0.25}))
        if step % 2 == 0:
            events.append(Evaluated(step, 2.0, None, True, {"accuracy": 0.5}))
    return [*events, Trained(steps[-1], steps[-1])]


def test_numbers_are_written_as_they_happen(tmp_path):
    directory = RunDirectory(tmp_path / "m")
    events = some_events(range(1, 5), 0)
    written = 0
    for event, passed in zip(events, record(events, directory), strict=True):
        assert passed is event
        written += isinstance(event, Step | Evaluated)
        assert len(directory.read_metrics()) == written
    lines = directory.read_metrics()
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4]
    step = asdict(events[1])
    assert lines[0] == step | step.pop("metrics")
    assert lines[2] == {"step": 2, "eval_loss": 2.0, "perplexity": None, "eval_accuracy": 0.5}


@pytest.mark.parametrize("reason", ["finished", "patience", "interrupted"])
def test_progress_says_how_a_run_ends(reason, tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.read_progress() == {}
    end = Trained(4, 4) if reason == "finished" else Stopped(4, reason)
    for event in record([Started(10, 0), end], directory):
        ended = None if isinstance(event, Started) else reason
        assert directory.read_progress() == {"steps": 10, "ended": ended}


@pytest.mark.parametrize("error", [veneer.TrainingError("no finite loss"), MemoryError()])
def test_progress_says_why_a_run_failed(error, tmp_path):
    def failing(*events: Event) -> Iterator[Event]:
        yield from events
        raise error

    directory = RunDirectory(tmp_path)
    with pytest.raises(type(error)):
        list(record(failing(), directory))  # before its start the files may be another run's
    assert directory.read_progress() == {}
    with pytest.raises(type(error)):
        list(record(failing(Started(10, 0)), directory))
    why = str(error) or "MemoryError"
    assert directory.read_progress() == {"steps": 10, "ended": "failed", "why": why}


def test_progress_says_the_verdict_and_what_failed_after_the_training(tmp_path):
    directory = RunDirectory(tmp_path)
    for kind, ended in (("learnt", "finished"), ("diverged", "diverged")):
        end = [Verdict(kind, f"It {kind}."), Trained(4, 0)]
        list(record([Started(10, 0), *end], directory))
        known = {"steps": 10, "ended": ended, "verdict": f"It {kind}."}
        assert directory.read_progress() == known

    def failing() -> Iterator[Event]:
        yield from [Started(10, 0), *end]
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        list(record(failing(), directory))
    why = "After the training: No space left on device"
    assert directory.read_progress() == {**known, "ended": "failed", "why": why}


@pytest.mark.parametrize("tail", ["", '{"step": 5, "lo', '{"step": 9}\n{"st', "\n"])
@pytest.mark.parametrize("done", [0, 3, 4])
def test_lines_up_to_the_resumed_step_are_kept(done, tail, tmp_path):
    cut, whole = RunDirectory(tmp_path / "cut"), RunDirectory(tmp_path / "whole")
    list(record(some_events(range(1, 5), 0), cut))
    with cut.metrics.open("a") as file:
        file.write(tail)
    list(record(some_events(range(done + 1, 7), done), cut))
    list(record(some_events(range(1, 7), 0), whole))
    assert cut.metrics.read_text() == whole.metrics.read_text()


def test_a_directory_without_files_says_nothing(tmp_path):
    directory = RunDirectory(tmp_path / "none")
    assert directory.read_metrics() == []
    assert directory.read_progress() == {}
    assert directory.read_recipe() == {}


def test_the_metrics_of_a_run_are_plain_json(tmp_path):
    directory = RunDirectory(tmp_path)
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2), seed=0)
    course = veneer.TrainConfig(lr=0.01, tokens_per_step=30, steps=3)
    list(record(veneer.train(model, ROWS, course, held_out=ROWS[:1]), directory))
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert [set(line) for line in lines if "loss" in line] == [
        {"step", "loss", "lr", "tokens", "label_tokens", "seconds", "rss_bytes"}
    ] * 3
