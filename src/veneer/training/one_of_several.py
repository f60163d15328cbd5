"""What a run does otherwise where it is one of several that are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from veneer.training.evaluate import Measurement


@dataclass(frozen=True, eq=False)
class OneOfSeveral:
    """What a run does for those that compare it with others; nothing, unless it is one of several.

    evaluate_at: shares of its steps after which it evaluates, beside where its config says. saves:
    whether its state is worth a checkpoint now. at_start: what the held-out rows come to before the
    first step; runs that begin at the same function have one list, and the first of them fills it.
    """

    evaluate_at: Sequence[Fraction] = ()
    saves: Callable[[], bool] = lambda: True
    at_start: list[Measurement] = field(default_factory=list)

    def evaluates(self, step: int, steps: int) -> bool:
        """Return whether a run of so many steps evaluates after this one for the others' sake."""
        return step in {math.ceil(share * steps) for share in self.evaluate_at}

    def measure_start(self, measure: Callable[[], Measurement]) -> Measurement:
        """Return what the held-out rows come to before the first step, measured once for all."""
        if not self.at_start:
            self.at_start.append(measure())
        return self.at_start[0]
