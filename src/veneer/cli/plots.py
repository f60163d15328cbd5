"""loss.png: how a run went, at a glance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veneer.errors import VeneerError


def draw_losses(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw training loss (each step and a smooth line), evaluation loss and learning rate.

    Raises VeneerError where matplotlib, which comes with the extra `plot`, is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise VeneerError(
            "There is no loss.png without matplotlib: pip install 'veneer[plot]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval_loss" in line]
    x, y = [line["step"] for line in steps], [line["loss"] for line in steps]
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 5.2), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
    top.plot(x, y, color="#9db4c8", linewidth=1, label="each step")
    smooth = smoothed(y)
    top.plot(x, smooth, color="#17517e", linewidth=2.2, label="training loss, smoothed")
    if held_out:
        ex, ey = [line["step"] for line in held_out], [line["eval_loss"] for line in held_out]
        top.plot(ex, ey, "o--", color="#b5482a", linewidth=1.6, label="evaluation loss")
        best = min(range(len(ey)), key=ey.__getitem__)
        top.annotate(
            f"{ey[best]:.3f}",
            (ex[best], ey[best]),
            xytext=(0, 9),
            textcoords="offset points",
            color="#b5482a",
            ha="center",
        )
    if smooth:
        top.annotate(
            f"{smooth[-1]:.3f}",
            (x[-1], smooth[-1]),
            xytext=(-4, 9),
            textcoords="offset points",
            color="#17517e",
            ha="right",
        )
    top.set_ylabel("loss per label token (nats)")
    top.set_ylim(bottom=0)
    top.legend(frameon=False)
    bottom.plot(x, [line["lr"] for line in steps], color="#5a5a5a", linewidth=1.4)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def smoothed(values: list[float], memory: float = 0.85) -> list[float]:
    """Return the exponential moving average, corrected for its start as Adam's moments are."""
    result, mean = [], 0.0
    for n, value in enumerate(values, start=1):
        mean = memory * mean + (1 - memory) * value
        result.append(mean / (1 - memory**n))
    return result
