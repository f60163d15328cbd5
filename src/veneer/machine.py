"""What this process may use of its machine: the processor, its cores, and memory. Imports no torch.

Linux says it in files below `root`. Elsewhere less is known, and nothing is guessed.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

ROOT = Path("/")
# The instructions that products are made of, as /proc/cpuinfo names them on x86 and ARM.
UNITS = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "ARM-BF16",
    "i8mm": "ARM-I8MM",
}
MULTIPLY_BF16 = ("AVX512-BF16", "AMX-BF16", "ARM-BF16")


@dataclass(frozen=True)
class Processor:
    """What a processor is called, and which of UNITS it has."""

    name: str
    units: tuple[str, ...]

    @property
    def multiplies_bf16(self) -> bool:
        """Whether it has instructions for products of bfloat16."""
        return any(unit in self.units for unit in MULTIPLY_BF16)


@dataclass(frozen=True)
class Cores:
    """How many cores there are.

    machine: of the machine. allowed: those that this process may run on. quota: how many of them
    the control groups above it let it use at a time, None where they set no limit.
    """

    machine: int
    allowed: int
    quota: float | None

    @property
    def usable(self) -> int:
        """How many are worth a thread each."""
        return self.allowed if self.quota is None else max(1, min(self.allowed, ceil(self.quota)))


def processor(root: Path = ROOT) -> Processor:
    """Return the processor of this machine."""
    lines = (line.partition(":") for line in _text(root / "proc/cpuinfo").splitlines())
    facts: dict[str, str] = {}
    for key, _, value in lines:
        facts.setdefault(key.strip(), value.strip())
    flags = f"{facts.get('flags', '')} {facts.get('Features', '')}".split()
    if not flags and platform.machine() in ("arm64", "aarch64"):
        flags = ["asimd"]  # which all of them have
    name = facts.get("model name") or platform.processor() or platform.machine()
    return Processor(name, tuple(unit for flag, unit in UNITS.items() if flag in flags))


def cores(root: Path = ROOT) -> Cores:
    """Return the cores of this machine, and how many of them this process may use."""
    machine = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    quotas = []
    for group, version in _groups(root, "cpu"):
        if version == 2:
            texts = _text(group / "cpu.max").split()
        else:
            texts = [_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(texts) == 2 and all(text.isdigit() for text in texts) and int(texts[1]):
            quotas.append(int(texts[0]) / int(texts[1]))  # "max" and -1 are no limit
    return Cores(machine, allowed, min(quotas, default=None))


def total_bytes(root: Path = ROOT) -> int | None:
    """Return the memory that this process could have, or None if the system does not say: that of
    the machine, or the least limit of the control groups above the process."""
    amounts = [_meminfo(root, "MemTotal")]
    for group, version in _groups(root, "memory"):
        text = _text(group / ("memory.max" if version == 2 else "memory.limit_in_bytes")).strip()
        amounts.append(int(text) if text.isdigit() else None)
    return min((amount for amount in amounts if amount is not None), default=None)


def free_bytes(root: Path = ROOT) -> int | None:
    """Return the memory that this process may still take, or None if the system does not say.

    The least of what the system has available (/proc/meminfo) and of what each control group above
    the process leaves (cgroup 1 and 2); pages of files that can be dropped count as free.
    """
    amounts = [_meminfo(root, "MemAvailable")]
    for group, version in _groups(root, "memory"):
        names = (
            ("memory.max", "memory.current", "inactive_file")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        amounts.append(_left(group, *names))
    return min((amount for amount in amounts if amount is not None), default=None)


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the directory of each control group above this process that a controller may limit, and
    the version of its files."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers:
            if controller not in controllers.split(","):
                continue
            mount /= controller
        # Within a container, its own group is mounted at the top.
        group = mount / path.lstrip("/")
        for directory in (group, *group.parents):
            yield directory, 1 if controllers else 2
            if directory == mount:
                break


def _meminfo(root: Path, name: str) -> int | None:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _left(group: Path, limit: str, usage: str, inactive: str) -> int | None:
    most, used = _text(group / limit).strip(), _text(group / usage).strip()
    if not (most.isdigit() and used.isdigit()):  # "max", or no such file
        return None
    stat = dict(line.split() for line in _text(group / "memory.stat").splitlines())
    return max(0, int(most) - int(used) + int(stat.get(inactive, 0)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
