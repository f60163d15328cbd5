"""comparison.png: quality against parameters, memory and time, readable without colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from itertools import product
from math import dist
from pathlib import Path
from typing import Any

from veneer.compare.quality import TITLES
from veneer.compare.summary import Comparison, Row
from veneer.errors import VeneerError

PICTURE = "comparison.png"
MARKERS = "osD^vPX*<>"
# Later points are smaller, to show what they cover.
LARGEST_MARKER, MARKER_STEP, SMALLEST_MARKER = 13.0, 0.7, 7.0
# From dark to light, so that they differ in grey too (Okabe and Ito's, by luminance).
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
# Where a name may be, seen from its point: angles' unit vectors, at growing distances.
SIDES = ((1, 0), (1, 0.8), (1, -0.8), (0, 1), (0, -1), (-1, 0), (-1, 0.8), (-1, -0.8))
DISTANCES = (11, 24, 36, 50, 66)
CROWD = 30  # pixels between points


def draw(comparison: Comparison, path: Path) -> None:
    """Draw three panels, each method a point with its name beside it.

    Raises VeneerError where matplotlib, which comes with the extra `compare`, is not installed,
    and where no run ended well.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise VeneerError(
            f"There is no {PICTURE} without matplotlib: pip install 'veneer[compare]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    def quality(row: Row) -> float | None:
        spread = row.quality if comparison.measure else row.eval_loss
        return None if spread is None else spread.mean

    base, *rows = comparison.rows
    rows = [row for row in rows if row.seeds and quality(row) is not None]
    if not rows:
        raise VeneerError(f"There is no {PICTURE}, for no run ended well.")
    title = TITLES[comparison.measure] if comparison.measure else "Evaluation loss"
    better = "higher" if comparison.measure else "lower"
    panels: list[tuple[str, Callable[[Row], float | None]]] = [
        ("trained parameters", lambda row: row.trained),
        ("peak memory (GB)", lambda row: row.peak and row.peak / 1e9),
        ("training time (minutes)", lambda row: row.minutes),
    ]
    figure, all_axes = pyplot.subplots(1, 3, figsize=(14, 4.6), sharey=True, layout="constrained")
    points = []
    for axes, (name, value) in zip(all_axes, panels, strict=True):
        there = [(row, value(row)) for row in rows]
        for i, (row, x) in enumerate(there):
            y = quality(row)
            if x is None or y is None:
                continue
            axes.plot(
                x,
                y,
                marker=MARKERS[i % len(MARKERS)],
                color=COLOURS[i % len(COLOURS)],
                linestyle="None",
                label=row.label.name,
                markeredgecolor="black",
                markersize=max(SMALLEST_MARKER, LARGEST_MARKER - MARKER_STEP * i),
                zorder=3,
            )
            points.append((axes, x, y, row.label.name))
        before = quality(base)
        if before is not None:
            axes.axhline(before, color="#5a5a5a", linewidth=1.2, linestyle=(0, (5, 4)), zorder=1)
        axes.set_xlabel(name)
        axes.margins(x=0.18, y=0.18)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    budget = comparison.config.allowed_of(comparison.base.steps)
    figure.suptitle(f"{comparison.model}: {budget} for each method", fontsize=11)
    all_axes[0].set_xscale("log")
    low, high = all_axes[0].get_xlim()
    between = (1.0, 2.0, 5.0) if high < 50 * low else (1.0,)
    all_axes[0].xaxis.set_major_locator(ticker.LogLocator(subs=between))
    all_axes[0].xaxis.set_major_formatter(ticker.EngFormatter())
    all_axes[0].xaxis.set_minor_formatter(ticker.NullFormatter())
    all_axes[0].set_ylabel(f"{title}, {better} is better")
    if quality(base) is not None:
        all_axes[0].annotate(
            "the base, untrained",
            (0.01, quality(base)),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color="#5a5a5a",
            fontsize=8.5,
        )
    drawn = [line for line in all_axes[0].get_lines() if line.get_linestyle() == "None"]
    key = [copy(line) for line in drawn]
    for line in key:
        line.set_markersize(8)
    figure.legend(
        key,
        [line.get_label() for line in drawn],
        loc="outside lower center",
        ncols=len(key),
        frameon=False,
        fontsize=9.5,
    )
    figure.draw_without_rendering()
    for axes in all_axes:
        name_points([point for point in points if point[0] is axes], axes, figure)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def name_points(points: Sequence[tuple[Any, float, float, str]], axes: Any, figure: Any) -> None:
    """Write each point's name beside it, at the first place where it covers nothing."""
    renderer = figure.canvas.get_renderer()
    taken = [_around(axes.transData.transform((x, y)), 9) for _, x, y, _ in points]
    taken += [extents(text, renderer) for text in axes.texts]
    for line in axes.get_lines():
        if line.get_linestyle() != "None":  # the base's, across the panel
            x0, _, x1, _ = axes.bbox.extents
            y = axes.transData.transform((0.5, line.get_ydata()[0]))[1]
            taken.append((x0, y - 2, x1, y + 2))
    centres = [axes.transData.transform((x, y)) for _, x, y, _ in points]
    for i in sorted(range(len(points)), key=lambda i: points[i][1:3]):
        _, x, y, name = points[i]
        # In a crowd, a name is farther off, and a line leads to its point.
        near = [dist(centres[i], other) < CROWD for j, other in enumerate(centres) if j != i]
        distances = DISTANCES[1:] if any(near) else DISTANCES
        for distance, (right, up) in product(distances, SIDES):
            text = axes.annotate(
                name,
                (x, y),
                xytext=(distance * right, distance * up),
                textcoords="offset points",
                ha={1: "left", 0: "center", -1: "right"}[right],
                va="center" if right else ("bottom" if up > 0 else "top"),
                fontsize=9.5,
                arrowprops={"arrowstyle": "-", "color": "#8a8a8a", "linewidth": 0.7}
                if distance > DISTANCES[0]
                else None,
                zorder=4,
            )
            box = extents(text, renderer)
            if not any(_overlap(box, other) for other in taken) and _within(box, axes):
                break
            text.remove()
        else:
            axes.annotate(
                name, (x, y), xytext=(DISTANCES[0], 0), textcoords="offset points", fontsize=9.5
            )
            continue
        taken.append(box)


def extents(text: Any, renderer: Any) -> tuple[float, float, float, float]:
    """Return where a text is, in pixels, without the line that leads to it."""
    from matplotlib.text import Text

    text.update_positions(renderer)
    left, bottom, right, top = Text.get_window_extent(text, renderer).extents
    return float(left), float(bottom), float(right), float(top)


def _around(place: Sequence[float], half: float) -> tuple[float, float, float, float]:
    x, y = place
    return x - half, y - half, x + half, y + half


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return bool(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def _within(box: Sequence[float], axes: Any) -> bool:
    left, bottom, right, top = axes.bbox.extents
    return bool(left <= box[0] and box[2] <= right + 12 and bottom <= box[1] and box[3] <= top)
