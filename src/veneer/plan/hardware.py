"""Memory, devices and links as people write them: 24GB, 8x24GB, 10GB/s. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from veneer.errors import ConfigError

SIZE = r"(\d{1,9}(?:\.\d{1,9})?) *([kmgt])(i?)b?"
MOST_DEVICES = 100_000


@dataclass(frozen=True)
class Devices:
    """`count` alike devices, each with `memory` bytes."""

    count: int
    memory: int


def bytes_of(size: str) -> int:
    """Return the bytes of a size such as 24GB (powers of 1000) or 80GiB (powers of 1024).

    Raises ConfigError for anything else.
    """
    count = _bytes(size)
    if count is None:
        raise ConfigError(f"--memory is {size!r}, but must be a size such as 24GB or 80GiB.")
    return count


def devices_of(text: str) -> Devices:
    """Return what "8x24GB" says. Raises ConfigError for anything else, with what to write.

    Devices that differ are refused: all take the same share, so the least decides.
    """
    texts = [kind.strip() for kind in text.split(",")]
    kinds = [kind for kind in map(_devices, texts) if kind is not None]
    if len(kinds) < len(texts):
        raise ConfigError(
            f"--devices is {text!r}, but must be a number of devices and the memory of each, such "
            "as 8x24GB or 4x80GiB."
        )
    least = min(kinds, key=lambda kind: kind.memory)
    if len(kinds) > 1:
        size = re.split("x", texts[kinds.index(least)], flags=re.IGNORECASE)[1].strip()
        raise ConfigError(
            f"--devices is {text!r}, but each device takes the same share, so that the least "
            f"memory decides: write {sum(kind.count for kind in kinds)}x{size}."
        )
    return least


def link_of(rate: str) -> int:
    """Return the bytes a second of a rate such as 10GB/s. Raises ConfigError for anything else."""
    size, slash, second = rate.strip().partition("/")
    count = _bytes(size) if slash and second.strip().lower() == "s" else None
    if count is None:
        raise ConfigError(f"--link is {rate!r}, but must be a rate such as 10GB/s or 900MB/s.")
    return count


def _devices(text: str) -> Devices | None:
    count, _, size = text.strip().lower().partition("x")
    memory = _bytes(size)
    if memory is None or not re.fullmatch(r"[1-9]\d{0,5}", count.strip()):
        return None
    return Devices(int(count), memory) if int(count) <= MOST_DEVICES else None


def _bytes(size: str) -> int | None:
    match = re.fullmatch(SIZE, size.strip().lower())
    if match is None or not float(match[1]):
        return None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (1 + "kmgt".index(match[2])))
