"""How adapters are combined: a frozen, validated value that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from veneer.checks import FRACTION, check_config, one_of, whole_number

CombineMethod = Literal["sum", "svd", "ties", "dare", "dare_ties", "magnitude_prune"]
SPARSE = ("ties", "dare", "dare_ties", "magnitude_prune")  # methods that drop entries
RANK = whole_number(1)


@dataclass(frozen=True)
class CombineConfig:
    """How several adapters become one. Raises ConfigError, listing everything that is wrong."""

    method: CombineMethod = "sum"
    """How: sum (exact, ranks add up), svd (the sum, cut to --rank), ties, dare, dare_ties or
    magnitude_prune (as their papers have them, over whole changes, then cut to --rank)."""
    rank: int | None = None
    """Rank of the result; not for sum, whose ranks add up."""
    expert_rank: int | None = None
    """Rank over each expert of a mixture; rank / number of experts, at least 1, unless given."""
    density: float | None = None
    """Share of the entries that ties, dare, dare_ties and magnitude_prune keep, above 0 up to 1."""
    seed: int = 0
    """Decides which entries dare and dare_ties drop."""

    def __post_init__(self) -> None:
        method = one_of(CombineMethod)
        is_sparse = self.method in SPARSE
        check_config(
            self,
            opening="Adapters cannot be combined so",
            rules={"method": method, "rank": RANK, "expert_rank": RANK, "density": FRACTION},
            contradictions={
                "sum is exact and has the ranks that add up; for a rank, use svd": (
                    self.method == "sum" and self.rank is not None
                ),
                "expert_rank would do nothing without a rank": (
                    self.rank is None and self.expert_rank is not None
                ),
                f"{self.method} needs a rank, which its result is cut to": (
                    method.holds(self.method) and self.method != "sum" and self.rank is None
                ),
                f"{self.method} needs a density: the share of the entries that it keeps": (
                    is_sparse and self.density is None
                ),
                f"density would do nothing with {self.method}": (
                    not is_sparse and self.density is not None
                ),
            },
        )


@dataclass(frozen=True)
class ExtractConfig:
    """How an adapter is extracted. Raises ConfigError, listing everything that is wrong."""

    rank: int | None = None
    """Rank of every layer."""
    expert_rank: int | None = None
    """Rank over each expert of a mixture; rank / number of experts, at least 1, unless given."""
    energy: float | None = None
    """Share of each layer's ‖ΔW‖² to keep, above 0 up to 1; the ranks follow from it."""
    embeddings: bool = False
    """Take embeddings too, and a head that is one weight with them; few other runtimes can."""

    def __post_init__(self) -> None:
        check_config(
            self,
            opening="An adapter cannot be extracted so",
            rules={"rank": RANK, "expert_rank": RANK, "energy": FRACTION},
            contradictions={
                "expert_rank would do nothing without a rank": (
                    self.rank is None and self.expert_rank is not None
                ),
                "give a rank or an energy, one of them": (self.rank is None)
                == (self.energy is None),
            },
        )
