"""How often one side's answers are better than the other's, to the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.rewards.judged import Answered, Weighted, judge

Z = 1.959964  # standard deviations around which a normal distribution has 95 %


def wilson(count: int, of: int, z: float = Z) -> tuple[float, float]:
    """Return the interval of a share, count of `of`, in which it lies in 95 % of such samples.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference": it stays
    within 0 and 1, and holds for few prompts too.
    """
    if not of:
        return 0.0, 1.0
    share = count / of
    middle = share + z * z / (2 * of)
    reach = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    scale = 1 + z * z / of
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


@dataclass(frozen=True)
class WinRate:
    """How many answers of one side are better than those of the other, equal, or worse; and how
    many prompts had an answer that could not be judged, with what its judge said first."""

    wins: int
    ties: int
    losses: int
    unjudged: int = 0
    first_fault: str = ""

    @property
    def judged(self) -> int:
        """The prompts whose answers were both judged."""
        return self.wins + self.ties + self.losses

    @property
    def decided(self) -> int:
        """The prompts where one answer is the better one."""
        return self.wins + self.losses

    @property
    def verdict(self) -> str:
        """Whether one side is better, by the interval of its wins among the prompts that decide."""
        low, high = wilson(self.wins, self.decided)
        return "better" if low > 0.5 else "worse" if high < 0.5 else "undecided"


def win_rate(
    ours: Sequence[Answered], theirs: Sequence[Answered], judges: Sequence[Weighted]
) -> WinRate:
    """Return how often our answers are worth more than theirs to the same prompts. judges: whose
    weighted sum an answer is worth."""
    own, other = judge(ours, judges), judge(theirs, judges)
    pairs = list(zip(own.rewards, other.rewards, strict=True))
    judged = [(a, b) for a, b in pairs if not (math.isnan(a) or math.isnan(b))]
    return WinRate(
        wins=sum(a > b for a, b in judged),
        ties=sum(a == b for a, b in judged),
        losses=sum(a < b for a, b in judged),
        unjudged=len(pairs) - len(judged),
        first_fault=own.first_fault or other.first_fault,
    )
