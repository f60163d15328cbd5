"""Law 12 for every kind of adapter, and for checkpoints: 2 and 4 processes equal one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.closeness import assert_no_further
from support.kinds import KINDS, Kind, is_first
from support.worlds import Case, Result, assert_learnt, trained, trained_by
from veneer import LoRA
from veneer.processes.world import World

pytestmark = pytest.mark.slow

# None with dropout, whose masks differ between numbers of processes, and none of files.
TRIED = [
    kind
    for kind in KINDS
    if is_first(kind)
    and not (kind.published or kind.on_disk)
    and not (kind.lora or {}).get("dropout")
]
CASES = {str(kind): Case(kind=str(kind), course=dict(kind.training)) for kind in TRIED}
IN_BF16 = {f"bf16 {name}": replace(CASES[name], dtype=torch.bfloat16) for name in [*CASES][:3]}
Results = dict[int, list[dict[str, Result]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return {
        size: trained_by(size, CASES | IN_BF16, tmp_path_factory.mktemp("all")) for size in (2, 4)
    }


def assert_as_one(case: Case, results: Results, name: str, place: Path, **other: Any) -> None:
    alone = trained(case, World(), place)
    reference = trained(replace(case, **other), World(), place)
    peer = alone
    if "course" in other:
        peer, reference = reference, alone
    for size, of_all in results.items():
        for result in of_all:
            assert result[name].error == "", size
            assert result[name].events == of_all[0][name].events
        ours = of_all[0][name]
        assert_learnt(ours, case)
        assert_no_further(ours.losses, peer.losses, reference.losses, f"losses of {size}")
        assert_no_further(ours.flat, peer.flat, reference.flat, f"weights of {size}")


@pytest.mark.parametrize("kind", TRIED, ids=str)
def test_every_kind_is_trained_as_by_one_process(
    kind: Kind, results: Results, tmp_path: Path
) -> None:
    case = CASES[str(kind)]
    other: dict[str, Any] = {"wide": True}
    if kind.bits:  # which have no float64: as near as one process is with other batches
        other = {"course": {**case.course, "tokens_per_batch": 40}}
    assert_as_one(case, results, str(kind), tmp_path, **other)


@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_is_within_its_noise(name: str, results: Results, tmp_path: Path) -> None:
    assert_as_one(IN_BF16[name], results, name, tmp_path, wide=True)


def test_a_run_of_four_goes_on_in_two_and_in_one(tmp_path: Path) -> None:
    whole = Case(course={"save_every": 1, "epochs": 2}, what=LoRA(rank=3, dora=True), place="whole")
    undisturbed = trained_by(4, {"run": whole}, tmp_path)[0]["run"]
    trained_by(4, {"run": replace(whole, stop_at=3, place="stopped")}, tmp_path)
    rests = {}
    for size in (1, 2, 4):
        place = f"goes on in {size}"
        shutil.copytree(tmp_path / "stopped", tmp_path / place)
        rest = replace(whole, place=place, resumes=True)
        if size == 1:
            rests[size] = trained(rest, World(), tmp_path)
        else:
            rests[size] = trained_by(size, {"run": rest}, tmp_path)[0]["run"]
    assert torch.equal(rests[4].flat, undisturbed.flat)
    assert rests[4].events == undisturbed.events[-len(rests[4].events) :]
    wide = trained(replace(whole, wide=True, place=None), World(), tmp_path)
    alone = trained(replace(whole, place=None), World(), tmp_path)
    for size in (1, 2):
        assert_learnt(rests[size], whole)
        assert_no_further(rests[size].flat, alone.flat, wide.flat, f"weights of {size}")
