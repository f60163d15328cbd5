"""A curve of bounded size, however many points it is given."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_POINTS = 256


@dataclass
class Curve:
    """A curve as at most MOST_POINTS means, each of `per_mean` consecutive points."""

    means: list[tuple[float, float]] = field(default_factory=list)
    per_mean: int = 1
    _pending: list[tuple[float, float]] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        """Add a point; x grows from one to the next."""
        self._pending.append((x, y))
        if len(self._pending) < self.per_mean:
            return
        self.means.append(_mean(self._pending))
        self._pending = []
        if len(self.means) > MOST_POINTS:
            pairs = zip(self.means[::2], self.means[1::2], strict=False)
            self._pending = self.means[len(self.means) // 2 * 2 :] * self.per_mean
            self.means = [_mean(list(pair)) for pair in pairs]
            self.per_mean *= 2

    def shown(self) -> list[tuple[float, float]]:
        """Return the curve, up to the newest point."""
        return [*self.means, _mean(self._pending)] if self._pending else list(self.means)


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    return points[-1][0], sum(y for _, y in points) / len(points)
