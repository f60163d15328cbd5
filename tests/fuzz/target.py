"""What is fuzzed: a parser, what it may be given, and the law that its end is judged by."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from support.endings import ending

CORPUS = Path(__file__).parent / "corpus"
NAMES = tuple(sorted(path.stem for path in (Path(__file__).parent / "targets").glob("[a-z]*.py")))
MEMORY = 256 * 2**20  # bytes by which one input may let the process grow
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss


@dataclass(frozen=True)
class Target:
    """A parser of foreign bytes.

    read: gives it the bytes, as a file below a directory where it takes files; raises whatever the
        parser raises, and AssertionError where something was read wrongly
    seeds: bytes to begin with, at least one of which is right
    mutate: changes bytes as only who knows the format can; a fuzzer's own changes are made beside
    modules: those of the parser, by which coverage is counted
    """

    read: Callable[[bytes, Path], object]
    seeds: Callable[[], Sequence[bytes]]
    modules: tuple[str, ...]
    mutate: Callable[[bytes, Random], bytes] | None = None


def target(name: str) -> Target:
    """Return a target by its name, that of its file."""
    module = import_module(f"fuzz.targets.{name}")
    return Target(module.read, module.seeds, module.MODULES, getattr(module, "mutate", None))


def judge(target: Target, data: bytes, place: Path) -> tuple[str, str | None]:
    """Return how the parser ends on some bytes, and what is wrong with that, if anything is."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end, wrong = ending(lambda: target.read(data, place))
    grown = UNIT * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if grown > MEMORY:
        wrong = wrong or f"it took {grown / 2**20:,.0f} MB"
    return end, wrong


def corpus(name: str) -> list[Path]:
    """Return the kept bytes of a target, a file each."""
    return sorted((CORPUS / name).glob("*"))


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()
