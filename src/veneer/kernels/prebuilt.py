"""Libraries that come in the wheel, one for each kind of processor, of which one is chosen here.

Where the wheel has none, as in an editable installation, sources are compiled when first needed.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

from veneer.kernels.compiling import LEVELS, prebuilt_name

DIRECTORY = Path(__file__).parent / "prebuilt"


@functools.cache
def level_here() -> tuple[str, str]:
    """Return the best of the wheel's levels that this processor runs, or ""; and why there is none,
    "" too where the wheel has no libraries."""
    if not DIRECTORY.is_dir():
        return "", ""
    levels, features = LEVELS.get(platform.machine(), ()), processor_features()
    for level in levels:
        if level.features <= features:
            return level.name, ""
    needed = ", ".join(sorted(levels[-1].features - features)) if levels else "another processor"
    return "", f"those of this wheel need {needed}"


def path_of(source: str, define: str) -> Path | None:
    """Return the library for this processor of a source with a macro, None where there is none."""
    level, _ = level_here()
    return DIRECTORY / prebuilt_name(source, define, level) if level else None


def build() -> str:
    """Return what this installation is made of: the commit, where a wheel says it, and where its
    native parts come from."""
    level, why_none = level_here()
    origin = f"native parts for {level}" if level else "native parts compiled at first use"
    commit = DIRECTORY / "COMMIT"
    facts = [commit.read_text(encoding="utf-8").strip()] if commit.exists() else []
    return ", ".join((*facts, origin, *([f"since {why_none}"] if why_none else [])))


def processor_features() -> frozenset[str]:
    """Return what Linux says that this processor has; nothing elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        if line.startswith(("flags", "Features")):  # on x86 and ARM
            return frozenset(line.partition(":")[2].split())
    return frozenset()
