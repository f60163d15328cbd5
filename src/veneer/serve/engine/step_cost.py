"""What a step's tokens cost, as measured: so many of them as the weights, which it reads once."""

from __future__ import annotations

from collections import deque
from statistics import median

UNMEASURED = 8.0  # about what processors give for weights in 16 bits
LEAST, MOST = 4.0, 64.0
FEW, RECENT = 3, 9  # steps of a size that are needed, and that count
EVERY = 16  # steps after which it is computed anew


class StepCost:
    """Fits seconds = a + b · tokens to the steps of late. reading: a / b, the tokens that take as
    long as the weights."""

    def __init__(self) -> None:
        self.reading = UNMEASURED
        self._steps = 0
        self._recent: dict[int, deque[tuple[int, float]]] = {}  # by the tokens' binary digits

    def add(self, tokens: int, seconds: float) -> None:
        """Note a step."""
        size = tokens.bit_length()
        self._recent.setdefault(size, deque(maxlen=RECENT)).append((tokens, seconds))
        self._steps += 1
        if self._steps % EVERY == 0:
            self.reading = self._fitted()

    def beside(self, rows: int) -> float:
        """Return how many more tokens take as long as a step of one token for each of `rows`."""
        return self.reading + rows

    def _fitted(self) -> float:
        points = [
            (median(tokens for tokens, _ in steps), median(seconds for _, seconds in steps))
            for steps in self._recent.values()
            if len(steps) >= FEW
        ]
        if len(points) < 2:
            return self.reading
        # Least squares of relative errors, so that a step of many tokens counts like any other.
        weights = [1 / max(y, 1e-9) ** 2 for _, y in points]
        total = sum(weights)
        x0 = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
        y0 = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
        up = sum(w * (x - x0) * (y - y0) for w, (x, y) in zip(weights, points, strict=True))
        across = sum(w * (x - x0) ** 2 for w, (x, _) in zip(weights, points, strict=True))
        b = up / across if across else 0.0
        return MOST if b <= 0 else min(max((y0 - b * x0) / b, LEAST), MOST)
