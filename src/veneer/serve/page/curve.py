"""A curve of bounded size, however many points it is given."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_POINTS = 256


@dataclass
class Curve:
    """Means of as many points in a row as it takes to have at most MOST_POINTS of them."""

    points: list[tuple[float, float]] = field(default_factory=list)
    together: int = 1
    _rest: list[tuple[float, float]] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        """Add a point; x grows from one to the next."""
        self._rest.append((x, y))
        if len(self._rest) < self.together:
            return
        self.points.append(_mean(self._rest))
        self._rest = []
        if len(self.points) > MOST_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=False)
            self._rest = self.points[len(self.points) // 2 * 2 :] * self.together
            self.points = [_mean(list(pair)) for pair in pairs]
            self.together *= 2

    def shown(self) -> list[tuple[float, float]]:
        """Return the points, up to the newest."""
        return [*self.points, _mean(self._rest)] if self._rest else list(self.points)


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    return points[-1][0], sum(y for _, y in points) / len(points)
