"""Law 12: N processes equal one, with the same rows in the same order and the same losses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from support.closeness import assert_no_further
from support.worlds import Case, Result, trained, trained_by
from veneer.errors import DataError
from veneer.processes.world import World
from veneer.training.events import Skipped, Step, Stopped
from veneer.run_directory import checkpoint_steps

import torch


def nan_in_the_last(world: World, passes: int) -> float:
    return math.nan if world.rank == world.size - 1 and passes == 2 else 1.0


def refused_in_the_last(world: World, passes: int) -> float:
    if world.rank == world.size - 1 and passes == 2:
        raise DataError("this row cannot be learnt")
    return 1.0


CASES = {
    "lora+": Case("lora+, llama"),
    "quantized": Case("lora, llama, 4 bits"),
    "new tokens": Case("new tokens, qwen2", padded=True),
    "prefix": Case("prefix, llama"),
    "one row a step": Case("lora, llama", {"tokens_per_step": 12, "tokens_per_batch": 12}),
    "patience": Case("lora, llama", {"lr": 0.5, "eval_every": 1, "patience": 2, "epochs": 3}),
    "stopped": Case("lora, llama", {"save_every": 1}, stop_at=2, place="stopped"),
}
SPOILT = {
    "skipped": Case("lora, llama", spoilt=nan_in_the_last),
    "refused": Case("lora, llama", spoilt=refused_in_the_last),
}


def assert_like_one(result: Result, case: Case, place: Path) -> None:
    """Assert that a result is as near to the same training in float64 as that of one process."""
    alone = trained(replace(case, place=None), World(), place)
    wide = trained(replace(case, place=None, dtype=torch.float64), World(), place)
    assert [type(event) for event in result.events] == [type(event) for event in alone.events]
    assert_no_further(result.losses, alone.losses, wide.losses, "losses")
    assert_no_further(result.flat, alone.flat, wide.flat, "weights")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Result]]]:
    place = tmp_path_factory.mktemp("two")
    return place, trained_by(2, CASES | SPOILT, place)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name: str, two: tuple[Path, list[dict[str, Result]]]) -> None:
    place, results = two
    first, second = (result[name] for result in results)
    assert (first.error, second.error) == ("", "")
    assert first.events == second.events
    assert torch.equal(first.flat, second.flat)
    assert_like_one(first, replace(CASES[name], stop_at=CASES[name].stop_at), place)
