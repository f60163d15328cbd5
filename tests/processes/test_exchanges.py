"""Exchanges between processes: the same result in each, errors too."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from support.together import together
from veneer.cli.company import goes_on
from veneer.errors import DataError
from veneer.processes.world import World
from veneer.run_directory import RunDirectory

LAUNCH = "job 7"


def _work() -> str:
    raise DataError("no rows")


def _exchange(world: World, directory: Path) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    assert (world.rank, world.size, world.writes) == (rank, size, rank == 0)
    values = torch.arange(3.0) + rank
    gathered = world.gather(values)
    assert torch.equal(gathered, torch.stack([torch.arange(3.0) + r for r in range(size)]))
    world.add_up(values)
    assert torch.equal(values, gathered.sum(0))
    assert world.sent.bytes_of == {"gather": 12, "sum": 12}
    assert world.share({"by": rank}) == {"by": 0}
    assert world.any(rank == 1)
    assert not world.any(False)
    assert world.first(os.getpid) == world.share(os.getpid())
    with pytest.raises(DataError, match="no rows"):
        world.first(_work)
    # Only one of two agents has counted a restart; both go on, or they would wait for each other.
    elastic = {"TORCHELASTIC_RUN_ID": LAUNCH, "TORCHELASTIC_RESTART_COUNT": str(rank)}
    with mock.patch.dict(os.environ, elastic):
        assert goes_on(world, RunDirectory(directory))


def test_every_process_has_the_result_of_an_exchange(tmp_path: Path) -> None:
    RunDirectory(tmp_path).write_launch(LAUNCH)
    together(_exchange, 2, tmp_path)


def test_a_process_alone_exchanges_nothing() -> None:
    world = World.current()
    values = torch.arange(3.0)
    world.add_up(values)
    assert torch.equal(world.gather(values), torch.arange(3.0)[None])
    assert world.first(lambda: 5) == 5
    assert world.any(True)
    assert not world.any(False)
    assert world.sent.total == 0
