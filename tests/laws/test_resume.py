"""Law 6: a resumed run equals the uninterrupted one, bit for bit."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from support.interrupted import COURSE, COURSES, LENGTHS, ROWS, Run, steps_of
from support.kinds import each_kind, in_share, is_first_of
from support.random_adapters import same, snapshot, trained_weights
from support.tiny_models import tiny
from veneer.formats import checkpoint as formats
from veneer.formats import native
from veneer.formats.capture import capture
from veneer.formats.state import AdapterState
from veneer.run_directory import checkpoint_steps
from veneer.training import checkpoint
from veneer.training.events import (
    Checkpointed,
    Evaluated,
    Event,
    Notice,
    Started,
    Step,
    Stopped,
    Trained,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Run]:
    runs = {}
    for name, course in COURSES.items():
        runs[name] = Run(tmp_path_factory.mktemp("whole"), course)
        runs[name].go(resume=False)
    return runs


def assert_equal(run: Run, whole: Run) -> None:
    assert same(run.weights, whole.weights)
    assert run.metrics() == whole.metrics()
    ends = [e for e in whole.events if isinstance(e, Trained | Stopped)]
    assert run.events[-len(ends) :] == ends


def test_the_courses_hold_what_they_should(whole):
    for run in whole.values():
        assert {Step, Evaluated, Checkpointed, Trained} <= {type(event) for event in run.events}
        started = run.events[0]
        assert isinstance(started, Started)
    assert Stopped(steps_of(whole["patience"]), "patience") in whole["patience"].events
    assert steps_of(whole["patience"]) < whole["patience"].events[0].steps
    last = whole["patience"].events[-1]
    assert isinstance(last, Trained)
    assert last.weights_of < last.step
    assert steps_of(whole["accumulation"]) >= 8


# The others end after each step, or after some checkpoints, in tests below.
FEW = {"seldom saved": (1, 4), "patience": (4,)}


@pytest.mark.parametrize(
    ("course", "few"),
    [
        *((each, True) for each in FEW),
        *(pytest.param(each, False, marks=pytest.mark.slow) for each in COURSES),
    ],
)
def test_stopped_at_any_step(few, course, whole, tmp_path):
    last = steps_of(whole[course])
    # After each step, runs end and go on below: those that die, and one that is stopped at all.
    for step in FEW[course] if few else range(1, last + 1):
        run = Run(tmp_path / str(step), COURSES[course])
        run.go(resume=False, stop_at=step)
        run.go(resume=True)
        assert_equal(run, whole[course])


def assert_goes_on_after(kinds: Any, course: str, whole: Run, place: Path, *, every: int) -> None:
    """Assert that a run goes on from the files that there are at events of these kinds, at any or
    at one in so many."""
    copies: list[Path] = []

    def note(event: Event) -> bool:
        if isinstance(event, kinds):
            copies.append(place / str(len(copies)))
            shutil.copytree(run.place, copies[-1])
        return False

    run = Run(place / "run", COURSES[course])
    run.go(resume=False, leave=note)
    assert len(copies) == sum(isinstance(event, kinds) for event in whole.events) > 0
    for copied in copies[::every]:
        rest = Run(copied, COURSES[course])
        rest.go(resume=True)
        assert_equal(rest, whole)


# Two courses end above and below at some steps, and "accumulation" saves as "constant" does.
@pytest.mark.parametrize(
    ("course", "every"),
    [
        ("constant", 3),
        *(pytest.param(each, 1, marks=pytest.mark.slow) for each in COURSES),
    ],
)
def test_dead_after_any_checkpoint(course, every, whole, tmp_path):
    assert_goes_on_after(Checkpointed, course, whole[course], tmp_path, every=every)


# An evaluation leaves the same files wherever checkpoints are, so one course dies behind it too.
@pytest.mark.parametrize(
    ("course", "kinds", "every"),
    [
        ("patience", Step | Evaluated, 4),
        pytest.param("patience", Step | Evaluated, 1, marks=pytest.mark.slow),
        pytest.param("seldom saved", Step, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_dead_after_any_step_or_evaluation(course, kinds, every, whole, tmp_path):
    assert_goes_on_after(kinds, course, whole[course], tmp_path, every=every)


@pytest.mark.parametrize(
    "course", ["accumulation", pytest.param("patience", marks=pytest.mark.slow)]
)
def test_stopped_at_every_step(course, whole, tmp_path):
    run = Run(tmp_path, COURSES[course])
    for step in range(1, steps_of(whole[course]) + 1):
        run.go(resume=step > 1, stop_at=step)
    run.go(resume=True)
    assert same(run.weights, whole[course].weights)
    assert run.metrics() == whole[course].metrics()


@pytest.mark.parametrize("course", COURSES)
def test_resuming_what_is_done_changes_nothing(course, whole, tmp_path):
    shutil.copytree(whole[course].place, tmp_path / "run")
    run = Run(tmp_path / "run", COURSES[course])
    run.go(resume=True)
    assert_equal(run, whole[course])
    assert not any(isinstance(event, Step) for event in run.events)


def same_adapter(a: AdapterState, b: AdapterState) -> bool:
    theirs, ours = native.tensors_of(a), native.tensors_of(b)
    return (
        native.config_of(a) == native.config_of(b)
        and theirs.keys() == ours.keys()
        and all(same(theirs[file], ours[file]) for file in ours)
    )


@each_kind(
    lambda kind: kind.reads_tokens and is_first_of(kind, "name"),
    fast=in_share(1, trains=True),
)
def test_every_kind_goes_on(kind, tmp_path):
    """The process that goes on starts with other random numbers: all must come from the files."""
    course = replace(COURSE, epochs=1, **kind.training)
    rows, held_out = kind.rows(LENGTHS), kind.rows([9, 14], seed=1)

    def check_files(place: Path, model: Any, first: AdapterState) -> None:
        """Check that the adapter can be read from the files alone, also as it was best."""
        places = checkpoint_steps(place)
        newest = places[max(places)]
        best = checkpoint.read(newest).progress["best_step"]
        assert same_adapter(formats.read(newest), capture(model))
        if kind.name == "prefix, mlp":
            with pytest.raises(veneer.AdapterError, match="made at the run's end only"):
                formats.read(newest, best=True)
        else:
            expected = formats.read(places[best]) if best else first
            assert same_adapter(formats.read(newest, best=True), expected)

    # Weights of 16 bits that train themselves have masters, which must go on as well.
    for dtype in [torch.float32, *[torch.bfloat16] * kind.replaces_weights]:
        losses: dict[int, float] = {}
        whole, died = (tmp_path / f"{dtype}" / name for name in ("whole", "died"))
        model = kind.attached(kind.base(dtype), seed=0)
        for event in veneer.train(model, rows, course, held_out=held_out, directory=whole):
            if isinstance(event, Step):
                losses[event.step] = event.loss
            is_one_adapter = len(veneer.in_use(model)) == 1
            if isinstance(event, Started) and is_one_adapter:
                first = copy.deepcopy(capture(model))
            if isinstance(event, Checkpointed) and event.step == 3:
                shutil.copytree(whole, died)
                then = snapshot(model)
                if is_one_adapter:
                    check_files(died, model, first)
        undisturbed = snapshot(model)
        assert not same(then, undisturbed)
        again = kind.attached(kind.base(dtype), seed=7)
        options = {"held_out": held_out, "directory": died, "resume": True}
        rest = [e for e in veneer.train(again, rows, course, **options) if isinstance(e, Step)]
        # After the best step, of which the weights are, too.
        assert {step.step: step.loss for step in rest} == dict(list(losses.items())[3:])
        assert same(snapshot(again), undisturbed)


def test_without_evaluation(tmp_path):
    whole, run = (Run(tmp_path / name, COURSE, held_out=()) for name in ("whole", "run"))
    whole.go(resume=False)
    run.go(resume=False, stop_at=5)
    run.go(resume=True)
    assert_equal(run, whole)
    last = steps_of(whole)
    assert sorted(checkpoint_steps(run.place / "checkpoints")) == [last - 1, last]


def test_nothing_to_resume_is_a_new_run(whole, tmp_path):
    run = Run(tmp_path, COURSE)
    run.go(resume=True)
    assert_equal(run, whole["accumulation"])


def test_best_and_last_are_kept(whole):
    for course in ("accumulation", "patience"):
        run = whole[course]
        best = [event.step for event in run.events if isinstance(event, Evaluated) and event.best]
        kept = checkpoint_steps(run.place / "checkpoints")
        last = steps_of(run)
        assert sorted(kept) == sorted({best[-1], last - 1, last})


def test_the_k_best_checkpoints_are_kept(tmp_path):
    course = replace(COURSE, keep_best=2, keep=1, save_every=None, lr=1.0)
    run = Run(tmp_path, course)
    run.go(resume=False, stop_at=5)
    run.go(resume=True)
    losses = {e.step: e.eval_loss for e in run.events if isinstance(e, Evaluated) and e.step}
    best = sorted(losses, key=lambda step: losses[step])[:2]
    assert max(best) < steps_of(run)  # so that none is there for being the newest
    assert sorted(checkpoint_steps(tmp_path / "checkpoints")) == sorted([*best, steps_of(run)])
    whole = Run(tmp_path / "whole", replace(course, keep_best=None))
    whole.go(resume=False)
    assert same(run.weights, whole.weights)  # what is kept changes nothing else


@pytest.mark.parametrize("at_end", [False, True])
def test_a_run_goes_on_along_another_schedule(at_end, whole, tmp_path):
    run = Run(tmp_path, COURSE, held_out=())
    run.go(resume=False, stop_at=0 if at_end else 4)
    done = steps_of(run)
    place = checkpoint_steps(tmp_path / "checkpoints")[done]
    stored = checkpoint.read(place).tensors
    longer = replace(COURSE, epochs=5, lr=0.01, weight_decay=0.1, tokens_per_batch=40)
    run.course = longer
    run.go(resume=True, leave=lambda event: isinstance(event, Started))
    assert {*(f"weights/{name}" for name in run.weights)} <= {*stored}
    assert all(torch.equal(stored[f"weights/{name}"], w) for name, w in run.weights.items())
    run.events = []
    run.go(resume=True)
    notice, started, *steps = [e for e in run.events if isinstance(e, Notice | Started | Step)]
    assert notice.text == (
        f"Going on from step {done + 1} of {started.steps} with epochs 5 (2.5 before), lr 0.01 "
        "(0.02 before), weight_decay 0.1 (0 before), tokens_per_batch 40 (20 before); the learning "
        "rate follows the new schedule."
    )
    assert started.steps == 2 * whole["accumulation"].events[0].steps
    assert [step.step for step in steps] == list(range(done + 1, started.steps + 1))
    assert [step.lr for step in steps] == [longer.lr_at(s.step, started.steps) for s in steps]
    assert [line["step"] for line in run.metrics()] == list(range(1, started.steps + 1))
    run.course = COURSE
    with pytest.raises(
        veneer.TrainingError, match=rf"5 before.*ends at step .* made {steps[-1].step}"
    ):
        run.go(resume=True)


@pytest.mark.parametrize("file", [checkpoint.STATE, checkpoint.TENSORS])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(file, whole, tmp_path):
    best = [e.step for e in whole["patience"].events if isinstance(e, Evaluated) and e.best]
    run = Run(tmp_path, COURSES["patience"])
    run.go(resume=False, stop_at=best[-1] + 1)
    places = checkpoint_steps(tmp_path / "checkpoints")
    assert sorted(places) == [best[-1], best[-1] + 1]
    spoilt = places[best[-1] + 1] / file
    spoilt.write_bytes(spoilt.read_bytes()[:-20])
    run.go(resume=True)
    *_, notice, started = [e for e in run.events if isinstance(e, Notice | Started)]
    assert started.done == best[-1]
    assert spoilt.parent.name in notice.text
    assert "an older checkpoint" in notice.text
    assert_equal(run, whole["patience"])


def train_all_layers(
    course: veneer.TrainConfig, place: Path, *, resume: bool, copy_to: Path | None = None
) -> dict[str, Tensor]:
    """Train an adapter on all layers, and copy the files that there are after step 3."""
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets="all"), seed=0)
    for event in veneer.train(model, ROWS, course, directory=place, resume=resume):
        if copy_to and isinstance(event, Checkpointed) and event.step == 3:
            shutil.copytree(place, copy_to)
    return trained_weights(model)


@pytest.fixture(scope="module")
def all_layers(tmp_path_factory) -> tuple[dict[str, Tensor], Path]:
    """The weights of a whole run, and its files as they were after step 3."""
    home = tmp_path_factory.mktemp("all layers")
    run = train_all_layers(COURSE, home / "whole", resume=False, copy_to=home / "died")
    return run, home / "died"


@pytest.mark.parametrize(
    "recompute",
    # A run of the command goes on with "full" (tests/cli/test_interrupted_run.py).
    [
        "selective",
        "disk",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("none", "full")),
    ],
)
def test_resumed_with_less_memory(recompute, all_layers, tmp_path):
    """Layers as two functions, and what they compute again, change no bit either."""
    whole, died = all_layers
    shutil.copytree(died, tmp_path / "died")
    rest = train_all_layers(replace(COURSE, recompute=recompute), tmp_path / "died", resume=True)
    assert same(rest, whole)
