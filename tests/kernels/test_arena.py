"""Memory is used again when nothing refers to it any more, and never before."""

import errno
import gc
import os

import pytest
import torch
from torch import nn

from veneer.errors import TrainingError
from veneer.kernels.arena import Arena
from veneer.kernels.disk_arena import DiskArena
from veneer.kernels.heap import kept_heap

LIKE = torch.empty(0, dtype=torch.bfloat16)


KINDS = ["memory", "disk"]


@pytest.fixture(params=KINDS)
def arena(request, tmp_path):
    return Arena() if request.param == "memory" else DiskArena(tmp_path)


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_used_again_when_the_last_view_is_gone(arena):
    first = arena.empty(10, 4, LIKE)
    assert (first.shape, first.dtype, first.is_contiguous()) == ((10, 4), LIKE.dtype, True)
    view, where = first[2:5].view(-1), address(first)
    del first
    assert address(arena.empty(10, 4, LIKE)) != where
    del view
    assert where in {address(arena.empty(10, 4, LIKE)) for _ in range(2)}


def test_as_many_at_once_as_are_asked_for(arena):
    for _ in range(3):
        tensors = [arena.empty(10, 4, LIKE).fill_(i) for i in range(20)]
        assert len({address(tensor) for tensor in tensors}) == 20
        assert all((tensor == i).all() for i, tensor in enumerate(tensors))
        held = {address(tensor) for tensor in tensors}
        del tensors
    assert {address(t) for t in [arena.empty(7, 4, LIKE) for _ in range(20)]} == held


def test_longer_steps_take_the_place_of_shorter_ones(arena):
    for rows in (5, 9, 3, 12, 12):
        tensors = [arena.empty(rows, 8, LIKE) for _ in range(3)]
        assert all(tensor.shape == (rows, 8) for tensor in tensors)
        del tensors
    (ring,) = arena._blocks.values()
    assert [len(block) for block in ring] == [12 * 8 * 2] * 3


def test_what_autograd_keeps_is_not_given_away(arena):
    weight = nn.Parameter(torch.ones(4))
    kept = arena.empty(3, 4, torch.empty(0)).fill_(2)
    loss = (kept * weight).sum()
    del kept
    gc.collect()
    arena.empty(3, 4, torch.empty(0)).fill_(7)
    loss.backward()
    assert torch.equal(weight.grad, torch.full((4,), 6.0))


def test_nothing_of_no_size(arena):
    assert arena.empty(0, 4, LIKE).shape == (0, 4)
    assert arena.empty(4, 0, LIKE).shape == (4, 0)


def test_a_file_without_a_name_takes_no_more_than_is_in_use(tmp_path):
    arena = DiskArena(tmp_path)
    for rows in (1000, 2000, 4000, 4000):
        arena.next_half()
        tensors = [arena.empty(rows, 512, LIKE).fill_(1) for _ in range(3)]
        before = arena.next_half()
        assert sum(size for _, size in before) >= 3 * tensors[0].nbytes
        arena.read_ahead(before)
        del tensors
        blocks = os.fstat(arena._file).st_blocks * 512
        assert 3 * rows * 1024 <= blocks < 3 * rows * 1024 + 2**20
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    arena = DiskArena(tmp_path)

    def full(file, first, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TrainingError, match=r"No space left on device, with .* at 2 MB more"):
        arena.empty(1000, 1000, LIKE)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(TrainingError, match="No file can be mapped in"):
        DiskArena(tmp_path / "none")


def test_the_heap_is_kept_and_given_back():
    with kept_heap():
        torch.ones(10_000_000).sum()
    torch.ones(10_000_000).sum()  # and goes on working
