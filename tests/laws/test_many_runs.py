"""Law 9: runs that share the passes over one base are each the run that it would be alone."""

from __future__ import annotations

import pytest
import torch

from support.closeness import assert_no_further
from support.many_runs import KINDS, TWELVE, Kind, Result, alone, one_by_one, together
from support.random_adapters import same
from veneer.errors import DivergedError
from veneer.training.events import Checkpointed, Event, Failed, Step, Stopped, Trained
from veneer.training.many import train as many

# The run of a rate at which nothing stays finite.
WILD = Kind({"rank": 2, "targets": "mlp"}, course={"lr": 1e30, "clip": 0, "warmup": 0})
# One that starts by a pass of its own, which draws no masks.
STARTS = Kind({"rank": 2, "targets": "qv", "init": "lora_ga", "dropout": 0.3}, course={"steps": 2})
ALL = KINDS | {"wild": WILD, "starts": STARTS}


@pytest.fixture(scope="module")
def solo(tmp_path_factory) -> dict[str, Result]:
    place = tmp_path_factory.mktemp("alone")
    return {name: alone(kind, place / name) for name, kind in ALL.items()}


@pytest.fixture
def oracle(monkeypatch):
    """Each job's batch is a pass of its own: all else is to be the same to the bit."""
    monkeypatch.setattr(many, "backward_together", one_by_one)


def assert_as_alone(result: Result, solo: Result) -> None:
    assert result.plain() == solo.plain()
    assert [type(event) for event in result.events] == [type(event) for event in solo.events]
    assert same(result.weights, solo.weights)


@pytest.mark.usefixtures("oracle")
def test_each_run_is_what_it_is_alone_whatever_becomes_of_the_others(solo, tmp_path):
    late = {name: ALL[name] for name in ("dora", "starts")}
    first = {name: kind for name, kind in ALL.items() if name not in late}
    steps: dict[str, int] = {}

    def leave(name: str, event: Event) -> bool:
        steps[name] = getattr(event, "step", 0)
        return False

    results = together(
        first,
        tmp_path,
        later=late | {"cancelled": ALL["qv"]},
        tokens_per_pass=60,
        leave=leave,
        should_stop=lambda name: name == "cancelled" and steps["cancelled"] == 2,
    )
    cancelled = results.pop("cancelled")
    assert results.keys() == solo.keys()
    for name, result in results.items():
        assert_as_alone(result, solo[name])
    assert isinstance(results["wild"].events[-1], Failed)
    assert isinstance(results["wild"].events[-1].error, DivergedError)
    assert Stopped(2, "interrupted") == cancelled.events[-1]
    assert cancelled.losses == solo["qv"].losses[:2]


@pytest.mark.slow  # tests/training/test_tune_many.py holds the same of whole runs
@pytest.mark.usefixtures("oracle")
def test_runs_that_died_go_on_from_where_each_was(solo, tmp_path):
    kinds = {name: KINDS[name] for name in ("qv", "patience")}
    steps = 0

    def dies(name: str, event: Event) -> bool:
        nonlocal steps
        steps += isinstance(event, Step)
        return steps == 5

    together(kinds, tmp_path, tokens_per_pass=60, leave=dies)
    for name, result in together(kinds, tmp_path, resume=True).items():
        ends = [event for event in solo[name].events if isinstance(event, Trained | Stopped)]
        assert result.events[-len(ends) :] == ends
        assert same(result.weights, solo[name].weights)
        assert solo[name].losses[-len(result.losses) :] == result.losses


def assert_near(ours: Result, theirs: Result, wide: Result, name: str) -> None:
    """Assert that a run that shared its passes is as near to one in float64 as a run alone is."""
    assert [type(event) for event in ours.events] == [type(event) for event in theirs.events]
    numbers = zip(*(each.numbers().items() for each in (ours, theirs, wide)), strict=True)
    for (what, own), (_, peer), (_, reference) in numbers:
        assert_no_further(own, peer, reference, f"{what} of {name}")


def test_passes_that_are_shared_move_no_run_further_than_rounding(solo):
    kinds = {name: KINDS[name] for name in ("qv", "dora")}  # the slow proof below has them all
    for name, result in together(kinds).items():
        wide = alone(KINDS[name], dtype=torch.float64)
        unsaved = [e for e in solo[name].events if not isinstance(e, Checkpointed)]
        assert_near(result, Result(unsaved, solo[name].weights), wide, name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_twelve_jobs_that_join_and_end_at_different_times(seed):
    names = [*TWELVE]
    first = {name: TWELVE[name] for name in names[::2]}
    later = {name: TWELVE[name] for name in names[1::2]} | {"wild": WILD, "cancelled": KINDS["qv"]}
    steps: dict[str, int] = {}

    def leave(name: str, event: Event) -> bool:
        steps[name] = getattr(event, "step", 0)
        return False

    results = together(
        first,
        later=later,
        seed=seed,
        leave=leave,
        should_stop=lambda name: name == "cancelled" and steps[name] == 2,
    )
    assert isinstance(results.pop("wild").events[-1], Failed)
    assert results.pop("cancelled").events[-1] == Stopped(2, "interrupted")
    assert results.keys() == TWELVE.keys()
    for name, result in results.items():
        wide = alone(TWELVE[name], dtype=torch.float64, seed=seed)
        assert_near(result, alone(TWELVE[name], seed=seed), wide, name)
