"""Checkpoints are written whole, and the newest whole one is used."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import veneer
from support.file_trees import (
    assert_modes_follow_the_umask,
    assert_whole_wherever_it_is_cut,
    tree,
)
from support.random_adapters import examples, shake, snapshot
from support.tiny_models import tiny
from veneer.run_directory import checkpoint_steps
from veneer.training import checkpoint
from veneer.training.checkpoint import Checkpoint


def state(step: int) -> Checkpoint:
    return Checkpoint(step, {"a": torch.full((3,), float(step))}, {"epoch": step // 2})


def test_checkpoints_keep_those_that_are_wanted(tmp_path):
    for step in range(1, 8):
        checkpoint.write(state(step), tmp_path, keep=[min(step, 3)])
    assert sorted(checkpoint_steps(tmp_path)) == [3, 7]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert (newest.step, newest.progress) == (7, {"epoch": 3})
    assert torch.equal(newest.tensors["a"], state(7).tensors["a"])


def test_checkpoints_of_many_steps_are_in_the_order_of_numbers(tmp_path):
    checkpoint.write(state(999_999), tmp_path, keep=())
    checkpoint.write(state(1_000_000), tmp_path, keep=[999_999])
    assert list(checkpoint_steps(tmp_path)) != []
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.step == 1_000_000


def test_writing_that_breaks_off_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    model = shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=2)))

    def write() -> None:
        checkpoint.write(Checkpoint(1, snapshot(model), {}), tmp_path / "a", keep=())

    assert_whole_wherever_it_is_cut(write, lambda: shake(model, seed=2), tmp_path, monkeypatch)


def test_modes_follow_the_umask(tmp_path):
    def write() -> None:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)  # a folder that is there keeps its mode
        checkpoint.write(state(1), tmp_path / "c", keep=())

    assert_modes_follow_the_umask(write, tmp_path)


def test_no_checkpoint(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "nowhere") is None


FAULTS: dict[str, Callable[[Path], object]] = {
    "no tensors": lambda place: (place / checkpoint.TENSORS).unlink(),
    "no numbers": lambda place: (place / checkpoint.STATE).unlink(),
    "cut tensors": lambda place: cut(place / checkpoint.TENSORS),
    "cut numbers": lambda place: cut(place / checkpoint.STATE),
    "empty numbers": lambda place: (place / checkpoint.STATE).write_text("{}"),
    "empty": lambda place: (shutil.rmtree(place), place.mkdir()),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(fault, tmp_path):
    for step in (1, 2):
        checkpoint.write(state(step), tmp_path, keep=[1])
    FAULTS[fault](tmp_path / "step-000002")
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.step == 1
    FAULTS[fault](tmp_path / "step-000001")
    with pytest.raises(veneer.AdapterError, match="step-000002"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_last_good_checkpoint_is_whole_and_has_learnt(fault, tmp_path):
    assert checkpoint.last_good(tmp_path) is None
    for step in (1, 2, 3):
        skips = {"skips": 1} if step == 2 else {"skips": 0}  # since the last step that learnt
        checkpoint.write(replace(state(step), progress=skips), tmp_path, keep=[1, 2])
    assert checkpoint.last_good(tmp_path) == tmp_path / "step-000003"
    FAULTS[fault](tmp_path / "step-000003")
    assert checkpoint.last_good(tmp_path) == tmp_path / "step-000001"
    FAULTS[fault](tmp_path / "step-000001")
    assert checkpoint.last_good(tmp_path) is None


def test_only_checkpoints_are_removed(tmp_path):
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-notes" / "x").write_text("mine")
    (tmp_path / "notes").write_text("mine")
    before = tree(tmp_path)
    checkpoint.write(state(1), tmp_path, keep=())
    checkpoint.remove_all(tmp_path)
    assert tree(tmp_path) == before


def test_damage_that_training_meets(tmp_path):
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2), seed=0)
    course = veneer.TrainConfig(steps=1)
    list(veneer.train(model, examples([9, 9]), course, directory=tmp_path))
    cut(tmp_path / "step-000001" / checkpoint.TENSORS)
    with pytest.raises(veneer.AdapterError, match="step-000001"):
        list(veneer.train(model, examples([9, 9]), course, directory=tmp_path, resume=True))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_adapter_of_a_run_is_that_of_its_newest_whole_checkpoint(fault, tmp_path):
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2), seed=0)
    course = veneer.TrainConfig(steps=2, save_every=1)
    list(veneer.train(model, examples([9, 9]), course, directory=tmp_path / "checkpoints"))
    FAULTS[fault](tmp_path / "checkpoints" / "step-000002")
    with pytest.warns(veneer.VeneerWarning, match=r"is taken, step 1.* Step 2 is newer, but dam"):
        veneer.load(tiny("llama"), tmp_path)


def test_an_adapter_that_is_half_written_is_none(tmp_path):
    veneer.save(veneer.attach(tiny("llama"), veneer.LoRA(rank=2)), tmp_path / ".a.partial-x")
    with pytest.raises(veneer.AdapterError):
        veneer.load(tiny("llama"), tmp_path)
