"""Law 12: N processes equal one, with the same rows in the same order and the same losses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.closeness import assert_no_further
from support.worlds import Case, Result, assert_learnt, trained, trained_by
from veneer import LoRA, Method
from veneer.errors import DataError
from veneer.objectives.config import Objective
from veneer.processes.world import World
from veneer.run_directory import checkpoint_steps
from veneer.training.events import Skipped, Step, Stopped


def nan_in_the_last(world: World, passes: int) -> float:
    return math.nan if world.rank == world.size - 1 and passes == 2 else 1.0


def refused_in_the_last(world: World, passes: int) -> float:
    if world.rank == world.size - 1 and passes == 2:
        raise DataError("this row cannot be learnt")
    return 1.0


CASES = {
    "lora+": Case(course={"lora_plus_ratio": 6.0}),
    "NF4": Case(bits=4),
    "new tokens, padded": Case(architecture="qwen2", new_tokens=True, padded=True),
    "a row a step": Case(course={"tokens_per_step": 12, "tokens_per_batch": 12}),
    "dpo": Case(objective=Objective("dpo", beta=0.7)),
    "sharded, new tokens": Case(
        architecture="qwen2", what=LoRA(rank=3, dora=True), new_tokens=True, sharded=True
    ),
    "stopped": Case(  # a prefix, whose whole course is among the slow proofs
        what=Method("prefix", virtual_tokens=5),
        course={"save_every": 1},
        stop_at=2,
        place="stopped",
    ),
}
MORE = {  # with less in them than one above, for the slow proofs
    "dora": Case(what=LoRA(rank=3, dora=True)),
    "prefix": Case(what=Method("prefix", virtual_tokens=5)),
    "sharded NF4": Case(bits=4, sharded=True),
    "context parallel": Case(course={"context_parallel": 2}),
}
SHARED = {  # rows that processes share
    "context parallel, from gradients": Case(
        what=LoRA(rank=3, init="lora_ga"),
        # In long steps, signs of the start's vectors matter, and they differ from dtype to dtype.
        course={"context_parallel": 2, "recompute": "full", "lr": 1e-4},
    ),
}
SPOILT = {
    "patience": Case(
        course={"lr": 0.5, "eval_every": 1, "patience": 2, "epochs": 3, "replay_passes": True}
    ),
    "skipped": Case(spoilt=nan_in_the_last),
    "refused": Case(spoilt=refused_in_the_last),
}


def assert_like_one(result: Result, case: Case, place: Path) -> None:
    """Assert that a result is as near to the same training in float64 as that of one process is; or
    over a quantized base as near to one process's as that is itself with other batches."""
    assert_learnt(result, case)
    case = replace(case, place=None, course={**case.course, "context_parallel": 1})
    alone = trained(case, World(), place)
    if case.bits:
        wider = replace(case, course={**case.course, "tokens_per_batch": 40})
        peer, reference = trained(wider, World(), place), alone
    else:
        peer, reference = alone, trained(replace(case, wide=True), World(), place)
    assert [type(event) for event in result.events] == [type(event) for event in alone.events]
    assert_no_further(result.losses, peer.losses, reference.losses, "losses")
    assert_no_further(result.learnt, peer.learnt, reference.learnt, "weights")
    # Or whatever was learnt would be near enough.
    assert (peer.learnt - reference.learnt).norm() < 0.05 * reference.learnt.norm()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Result]]]:
    place = tmp_path_factory.mktemp("two")
    return place, trained_by(2, CASES | SHARED | SPOILT, place)


@pytest.mark.parametrize("name", CASES | SHARED)
def test_two_processes_equal_one(name: str, two: tuple[Path, list[dict[str, Result]]]) -> None:
    place, results = two
    first, second = (result[name] for result in results)
    assert (first.error, second.error) == ("", "")
    assert first.events == second.events
    assert torch.equal(first.flat, second.flat)
    assert_like_one(first, (CASES | SHARED)[name], place)


@pytest.mark.slow
def test_two_processes_equal_one_in_more_cases(tmp_path: Path) -> None:
    first, second = trained_by(2, MORE, tmp_path)
    for name, case in MORE.items():
        assert first[name].error == second[name].error == ""
        assert first[name].events == second[name].events
        assert torch.equal(first[name].flat, second[name].flat)
        assert_like_one(first[name], case, tmp_path)


@pytest.mark.slow
def test_four_processes_in_groups_of_two_equal_one(tmp_path: Path) -> None:
    cases = SHARED | {"context parallel": MORE["context parallel"]}
    results = trained_by(4, cases, tmp_path)
    for name, case in cases.items():
        first, *others = (result[name] for result in results)
        assert all(other.error == first.error == "" for other in others)
        assert all(torch.equal(first.flat, other.flat) for other in others)
        assert_like_one(first, case, tmp_path)


def test_all_skip_a_step_in_which_one_has_no_finite_loss(
    two: tuple[Path, list[dict[str, Result]]],
) -> None:
    first, second = (result["skipped"] for result in two[1])
    assert first.events == second.events
    assert torch.equal(first.flat, second.flat)
    assert sum(isinstance(event, Skipped) for event in first.events) == 1


def test_all_lose_patience_at_once(two: tuple[Path, list[dict[str, Result]]]) -> None:
    first, second = (result["patience"] for result in two[1])
    assert first.events == second.events
    assert any(isinstance(event, Stopped) for event in first.events)


def test_passes_that_several_processes_make_are_not_replayed_and_a_notice_says_so(
    two: tuple[Path, list[dict[str, Result]]],
) -> None:
    notices = two[1][0]["patience"].notices
    assert any("several processes train together" in text for text in notices), notices


def test_an_error_of_one_ends_all_with_the_same_words(
    two: tuple[Path, list[dict[str, Result]]],
) -> None:
    errors = [result["refused"].error for result in two[1]]
    assert errors == ["DataError: this row cannot be learnt"] * 2


def test_all_stop_where_one_is_asked_to_and_one_writes(
    two: tuple[Path, list[dict[str, Result]]],
) -> None:
    place, results = two
    stopped = Stopped(2, "interrupted")
    assert all(result["stopped"].events[-1] == stopped for result in results)
    assert 2 in checkpoint_steps(place / "stopped")


def test_the_gradient_of_what_trains_is_sent_once_a_step(
    two: tuple[Path, list[dict[str, Result]]],
) -> None:
    for name, case in CASES.items():
        result = two[1][0][name]
        steps = sum(isinstance(event, Step) for event in result.events)
        gradient = sum(weight.nbytes for weight in result.weights.values())
        metrics = sum(len(getattr(event, "metrics", ())) for event in result.events)
        beside = 100 * len(result.events) + 16 * metrics  # a metric is a sum and a count
        assert result.sent["sum"] - steps * gradient <= beside, name
        shards = {"shards"} if case.sharded else set()
        assert {*result.sent} <= {"sum", "gather", "copy"} | shards, case
