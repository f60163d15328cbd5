"""Trackers: what they are given, by which name, and that none of them ends a run."""

from contextlib import closing
from pathlib import Path
from threading import Event

import pytest

from veneer.errors import ConfigError, VeneerError, VeneerWarning
from veneer.training.events import Evaluated, Notice, Started, Step, Stopped, Verdict
from veneer.training.tracking import choice, sender
from veneer.training.tracking import tracked as tracking
from veneer.training.tracking.choice import trackers
from veneer.training.tracking.tracked import tracked

EVENTS = [
    Started(2, 0),
    Evaluated(0, 3.0, 20.0, best=True),
    Step(1, 2.0, 0.1, 40, 10, 0.5, 1000, {"reward": 0.25}),
    Step(2, 1.5, 0.1, 40, 10, 0.5, 1000),
    Evaluated(2, 1.25, None, best=True, metrics={"accuracy": 0.5}),
]
SETTINGS = {"model": "m", "rank": 8, "targets": "attention"}


class Recorder:
    """A tracker that keeps what it gets, and fails at a call if asked to."""

    def __init__(self, failing: str = "") -> None:
        self.name, self.failing, self.calls = "Recorder", failing, []

    def _take(self, call: str, *values: object) -> None:
        self.calls.append((call, *values))
        if call == self.failing:
            raise OSError("the server is gone\nfor long")

    def begin(self, settings):
        self._take("begin", settings)

    def log(self, points):
        for point in points:
            self._take("log", point.step, point.numbers)

    def end(self, outcome):
        self._take("end", outcome)


def test_a_tracker_gets_settings_numbers_and_the_end():
    recorder = Recorder()
    assert list(tracked(EVENTS, [recorder], SETTINGS)) == EVENTS
    assert recorder.calls[0] == ("begin", SETTINGS)
    assert recorder.calls[1] == ("log", 0, {"eval/loss": 3.0, "eval/perplexity": 20.0})
    _, step, numbers = recorder.calls[2]
    assert step == 1
    assert numbers["train/loss"] == 2.0
    assert numbers["train/reward"] == 0.25
    assert numbers["speed/tokens_per_second"] == 80.0
    assert recorder.calls[4] == ("log", 2, {"eval/loss": 1.25, "eval/accuracy": 0.5})
    assert recorder.calls[5:] == [("end", "finished")]


@pytest.mark.parametrize("call", ["begin", "log", "end"])
def test_one_that_fails_is_announced_once_and_the_run_and_the_others_go_on(call):
    failing, other = Recorder(call), Recorder()
    events = list(tracked(EVENTS, [failing, other], SETTINGS))
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert notice.text == "Recorder failed and gets no more of this run: the server is gone"
    assert [event for event in events if event is not notice] == EVENTS
    assert failing.calls[-1][0] == call
    assert [name for name, *_ in failing.calls].count(call) == 1
    assert len(other.calls) == 6


class Hanging(Recorder):
    """A tracker that does not return from a call until it is released."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.call, self.released = call, Event()

    def _take(self, call: str, *values: object) -> None:
        super()._take(call, *values)
        if call == self.call:
            self.released.wait()


@pytest.mark.parametrize("call", ["begin", "log", "end"])
def test_one_that_hangs_holds_nothing_up_and_is_announced(call, monkeypatch):
    monkeypatch.setattr(tracking, "PATIENCE", 0.0)
    hanging = Hanging(call)
    events = list(tracked(EVENTS, [hanging], SETTINGS))
    hanging.released.set()
    assert [event for event in events if not isinstance(event, Notice)] == EVENTS
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert "does not take the rest" in notice.text


def test_points_that_wait_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(sender, "MOST_WAITING", 2)
    hanging = Hanging("begin")
    events = list(tracked(EVENTS, [hanging], SETTINGS))
    hanging.released.set()
    at = events.index(EVENTS[3])  # the third with numbers
    assert events[at - 1].text.endswith("it is 2 points behind")
    assert sum(isinstance(event, Notice) for event in events) == 1


def test_what_fails_after_the_last_event_is_taken_is_a_warning():
    recorder = Recorder("end")
    with (
        pytest.warns(VeneerWarning, match="Recorder failed"),
        closing(tracked(EVENTS, [recorder], {})) as events,
    ):
        next(events)
    assert recorder.calls[-1] == ("end", "interrupted")


def test_how_a_run_ended_is_what_its_tracker_gets():
    recorder = Recorder()
    with closing(tracked([*EVENTS, Stopped(2, "interrupted")], [recorder], {})) as events:
        for event in events:
            if isinstance(event, Stopped):
                break
    assert recorder.calls[-1] == ("end", "interrupted")
    recorder = Recorder()
    list(tracked([*EVENTS, Verdict("diverged", "higher than before")], [recorder], {}))
    assert recorder.calls[-1] == ("end", "diverged")

    def broken():
        yield from EVENTS
        raise RuntimeError

    recorder = Recorder("end")  # which fails itself, too
    with pytest.raises(RuntimeError), pytest.warns(VeneerWarning, match="the server is gone"):
        list(tracked(broken(), [recorder], {}))
    assert recorder.calls[-1] == ("end", "failed")


def test_names_that_are_none_and_libraries_that_are_missing(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="'tensorbord' is no tracker; did you mean") as error:
        trackers(["tensorbord", "neptune"], tmp_path)
    assert "'neptune'" in str(error.value)
    with pytest.raises(ConfigError, match="tensorboard is named twice"):
        trackers(["tensorboard:curves", "tensorboard"], tmp_path)
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(VeneerError, match=r"pip install 'veneer\[track,mlflow\]'"):
        trackers(["tensorboard", "mlflow:there"], tmp_path)


def run(spec: str, out: Path) -> None:
    """Give EVENTS to a tracker, which must not fail."""
    events = list(tracked(EVENTS, trackers([spec], out), SETTINGS))
    assert events == EVENTS


@pytest.mark.parametrize("place", ["", ":curves"])
def test_tensorboard_gets_the_curves(tmp_path, place):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(f"tensorboard{place}", tmp_path / "out")
    directory = tmp_path / ("curves" if place else "out/tensorboard")
    events = EventAccumulator(str(directory)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(0, 3.0), (2, 1.25)]


@pytest.mark.slow
def test_mlflow_keeps_the_numbers_in_files(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run("mlflow", tmp_path / "out")
    client = MlflowClient((tmp_path / "out" / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("veneer")
    (kept,) = client.search_runs([experiment.experiment_id])
    assert kept.info.status == "FINISHED"
    assert kept.info.run_name == "out"
    assert kept.data.params == {"model": "m", "rank": "8", "targets": "attention"}
    history = client.get_metric_history(kept.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.5)]


@pytest.mark.slow
def test_wandb_keeps_the_numbers_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    run("wandb:island", tmp_path / "out")
    (file,) = (tmp_path / "out").glob("wandb/offline-run-*/run-*.wandb")
    assert wandb.run is None
    content = file.read_bytes()
    for text in (b"train/loss", b"eval/loss", b"island", b"attention"):
        assert text in content


def test_wandb_without_a_key_is_refused_before_the_run_begins(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda prompt: prompt)
    with pytest.raises(ConfigError, match="wandb login"):
        trackers(["wandb"], tmp_path)
