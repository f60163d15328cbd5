"""Losses that stand out from those before them, told by numbers that a few such losses do not move.

A loss is a spike where it is more than DEVIATIONS standard deviations above the median of the last
ones, the deviation being 1.4826 times the median absolute deviation, as of a normal distribution
(Rousseeuw and Croux 1993), and more than half the median above it: where losses hardly differ, a
small step up is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

WINDOW = 64  # losses that are looked at
FEWEST = 16  # before which nothing is usual yet
DEVIATIONS = 8.0
MOST_IN_A_ROW = 2  # steps that are left out; after them the level of the loss is another


def usual_and_most(losses: Sequence[float]) -> tuple[float, float]:
    """Return the loss that is usual after these, and the largest that is no spike, ∞ where too few
    are known."""
    recent = [loss for loss in losses if math.isfinite(loss)][-WINDOW:]
    if len(recent) < FEWEST:
        return math.nan, math.inf
    middle = median(recent)
    deviation = 1.4826 * median(abs(loss - middle) for loss in recent)
    return middle, middle + max(DEVIATIONS * deviation, 0.5 * abs(middle))
