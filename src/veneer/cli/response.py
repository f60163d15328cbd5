"""response.png: the loss of each trial against its rate, readable without colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.errors import VeneerError
from veneer.training.search.result import SearchResult, TrialResult

# From dark to light, so that they differ in grey too (Okabe and Ito's, by luminance).
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vPX"


def draw_response(result: SearchResult, path: Path) -> None:
    """Draw a panel for each value of a third setting, if there is one: the evaluation loss against
    the first setting of numbers, a series for each value of the second.

    Trials that ended early are hollow, and at the loss that they had. Raises VeneerError where
    matplotlib, which comes with the extra `search`, is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise VeneerError(
            f"There is no {path.name} without matplotlib: pip install 'veneer[search]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    trials = [trial for trial in result.trials if trial.loss is not None]
    if not trials:
        raise VeneerError(f"There is no {path.name}, for no trial was measured.")
    x, series, panels = axes_of(trials)
    columns = sorted({_of(trial, panels) for trial in trials}, key=str)
    names = sorted({_of(trial, series) for trial in trials}, key=_order)
    figure, all_axes = pyplot.subplots(
        1,
        len(columns),
        figsize=(1.2 + 4.6 * len(columns), 4.4),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axes, column in zip(all_axes[0], columns, strict=True):
        for number, name in enumerate(names):
            own = [t for t in trials if _of(t, panels) == column and _of(t, series) == name]
            _draw_series(axes, own, x, number, _title(series, name))
        if panels is not None:
            axes.set_title(_title(panels, column), fontsize=10)
        axes.set_xlabel("learning rate" if x == "lr" else x)
        values = [trial.values[x] for trial in trials]
        if all(isinstance(value, float) and value > 0 for value in values):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 3.0)))
            axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    all_axes[0][0].set_ylabel("evaluation loss per label token (nats)")
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    if series is not None and handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def axes_of(trials: Sequence[TrialResult]) -> tuple[str, str | None, str | None]:
    """Return which setting is along the axis, which is a series and which a panel: the axis has
    that of most values, the rate before others, and those of few values are told apart."""
    names = dict.fromkeys(name for trial in trials for name in trial.values)
    counts = {name: len({trial.values.get(name) for trial in trials}) for name in names}
    x, *others = sorted(names, key=lambda name: (name != "lr", -counts[name]))
    few = [name for name in others if counts[name] <= len(COLOURS)]
    few.sort(key=lambda name: (name != "rank", -counts[name]))
    series, panels, *_ = (*few, None, None)
    return x, series, panels


def _draw_series(axes: Any, trials: list[TrialResult], x: str, number: int, label: str) -> None:
    """Draw the trials of one series: complete ones joined by a line, the others hollow."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    complete = sorted(
        (t for t in trials if t.state == "complete"), key=lambda t: _order(t.values[x])
    )
    others = [trial for trial in trials if trial.state != "complete"]
    axes.plot(
        [t.values[x] for t in complete],
        [t.loss for t in complete],
        color=colour,
        marker=marker,
        linewidth=1.2,
        label=label,
        zorder=3,
    )
    axes.plot(
        [t.values[x] for t in others],
        [t.loss for t in others],
        color=colour,
        marker=marker,
        linestyle="None",
        markerfacecolor="none",
        alpha=0.6,
        zorder=2,
    )


def _title(name: str | None, value: Any) -> str:
    """Return what trials with a value are called. A pattern's $ would begin a formula."""
    return "" if name is None else f"{name} {value}".replace("$", r"\$")


def _of(trial: TrialResult, name: str | None) -> Any:
    return None if name is None else trial.values.get(name)


def _order(value: Any) -> tuple[bool, float, str]:
    is_number = isinstance(value, int | float)
    return (not is_number, float(value) if is_number else 0.0, str(value))
