"""How adapters are combined: a frozen, validated value that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from veneer.errors import ConfigError

CombineMethod = Literal["sum", "svd", "ties", "dare", "dare_ties", "magnitude_prune"]
SPARSE = ("ties", "dare", "dare_ties", "magnitude_prune")  # what keeps a part of the entries


@dataclass(frozen=True)
class CombineConfig:
    """How several adapters become one. Raises ConfigError, listing everything that is wrong."""

    method: CombineMethod = "sum"
    """How: sum (exact, ranks add up), svd (the sum, cut to --rank), ties, dare, dare_ties or
    magnitude_prune (as their papers have them, over whole changes, then cut to --rank)."""
    rank: int | None = None
    """Rank of the result: of all methods but sum, whose ranks add up."""
    density: float | None = None
    """Share of the entries that ties, dare, dare_ties and magnitude_prune keep, above 0 up to 1."""
    seed: int = 0
    """Decides which entries dare and dare_ties drop."""

    def __post_init__(self) -> None:
        problems = []
        if self.method not in get_args(CombineMethod):
            known = ", ".join(get_args(CombineMethod))
            problems.append(f"method is {self.method!r}, but must be one of {known}")
        elif self.method == "sum" and self.rank is not None:
            problems.append("sum is exact and has the ranks that add up; for a rank, use svd")
        elif self.method != "sum" and self.rank is None:
            problems.append(f"{self.method} needs a rank, which its result is cut to")
        if self.rank is not None and not _is_whole(self.rank):
            problems.append(f"rank is {self.rank!r}, but must be a whole number of at least 1")
        if self.method in SPARSE and self.density is None:
            problems.append(
                f"{self.method} needs a density: the share of the entries that it keeps"
            )
        if self.method not in SPARSE and self.density is not None:
            problems.append(f"density would do nothing with {self.method}")
        if self.density is not None and not _is_share(self.density):
            problems.append(f"density is {self.density!r}, but must be above 0 and at most 1")
        if problems:
            raise ConfigError("Adapters cannot be combined so: " + "; ".join(problems) + ".")


@dataclass(frozen=True)
class ExtractConfig:
    """How much of a change is kept. Raises ConfigError, listing everything that is wrong."""

    rank: int | None = None
    """Rank of every layer."""
    energy: float | None = None
    """Share of each layer's ‖ΔW‖² to keep, above 0 up to 1; the ranks follow from it."""
    embeddings: bool = False
    """Take embeddings too, and a head that is one weight with them; few other runtimes can."""

    def __post_init__(self) -> None:
        problems = []
        if (self.rank is None) == (self.energy is None):
            problems.append("give a rank or an energy, one of them")
        if self.rank is not None and not _is_whole(self.rank):
            problems.append(f"rank is {self.rank!r}, but must be a whole number of at least 1")
        if self.energy is not None and not _is_share(self.energy):
            problems.append(f"energy is {self.energy!r}, but must be above 0 and at most 1")
        if problems:
            raise ConfigError("An adapter cannot be extracted so: " + "; ".join(problems) + ".")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value <= 1
