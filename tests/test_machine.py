"""What this process may use, as the files of the system say it."""

import os
from pathlib import Path

import pytest

from veneer.machine import cores, free_bytes, processor, total_bytes


def machine(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        (MEMINFO, 8000 * 1024),
        (
            MEMINFO
            | {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "10\n",
                "sys/fs/cgroup/a/memory.max": "5000\n",
                "sys/fs/cgroup/a/memory.current": "3000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 700\n",
            },
            2700,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,memory:/x\n3:cpuset:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "6000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 1\n",
            },
            5001,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "10\n",
                "sys/fs/cgroup/memory.current": "20\n",
            },
            0,
        ),
    ],
    ids=["nothing", "system", "cgroup 2", "cgroup 1", "over its limit"],
)
def test_free_memory_is_the_least_that_anybody_leaves(tmp_path, files, free):
    assert free_bytes(machine(tmp_path, files)) == free


def test_free_memory_of_this_machine():
    if Path("/proc/meminfo").exists():
        assert free_bytes() > 0


def test_the_memory_of_a_control_group_is_all_that_there_is(tmp_path):
    assert total_bytes(machine(tmp_path, MEMINFO)) == 9000 * 1024
    group = {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "5000\n"}
    assert total_bytes(machine(tmp_path, group)) == 5000


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            },
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/y\n3:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
    ],
    ids=["nothing", "no limit", "cgroup 2", "cgroup 1"],
)
def test_cores_are_those_that_nobody_withholds(tmp_path, files, quota, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    here = cores(machine(tmp_path, files))
    assert (here.allowed, here.quota) == (3, quota)
    assert here.usable == (3 if quota is None else 2 if quota == 1.5 else 1)


@pytest.mark.parametrize(
    ("lines", "units", "bf16"),
    [
        ("model name\t: A\nflags\t\t: fpu avx2 avx512f avx512_vnni\n", 3, False),
        ("model name\t: A\nflags\t\t: avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n", 4, True),
        ("Features\t: fp asimd i8mm bf16\n", 3, True),
        ("Features\t: fp asimd\n", 1, False),
    ],
    ids=["Cascade Lake", "Sapphire Rapids", "ARM", "older ARM"],
)
def test_a_processor_has_the_units_that_the_system_lists(tmp_path, lines, units, bf16):
    here = processor(machine(tmp_path, {"proc/cpuinfo": lines + lines}))
    assert len(here.units) == units
    assert here.multiplies_bf16 == bf16
