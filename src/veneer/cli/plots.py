"""loss.png: how a run went, at a glance."""

from __future__ import annotations

from itertools import accumulate
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
    if any("equal_groups" in line for line in steps):
        _draw_rewards(steps, [line for line in lines if "eval_reward" in line], path)
        return
    held_out = [line for line in lines if "eval_loss" in line]
    x, y = [line["step"] for line in steps], [line["loss"] for line in steps]
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 5.2), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
    top.plot(x, y, color="#9db4c8", linewidth=1, label="each step")
    smooth = smoothed(y)
    top.plot(x, smooth, color="#17517e", linewidth=2.2, label="training loss, smoothed")
    ends = [(x[-1], smooth[-1], "#17517e")] if smooth else []
    if held_out:
        ex, ey = [line["step"] for line in held_out], [line["eval_loss"] for line in held_out]
        top.plot(ex, ey, "o--", color="#b5482a", linewidth=1.6, label="evaluation loss")
        best = min(range(len(ey)), key=ey.__getitem__)
        ends.append((ex[best], ey[best], "#b5482a"))
    # The higher of two numbers is above its point and the lower below, so that they never meet.
    for place, (at, loss, colour) in enumerate(sorted(ends, key=lambda end: -end[1])):
        top.annotate(
            f"{loss:.3f}",
            (at, loss),
            xytext=(4, 6 if place == 0 else -6),
            textcoords="offset points",
            color=colour,
            va="bottom" if place == 0 else "top",
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


def _draw_rewards(steps: list[dict[str, Any]], held_out: list[dict[str, Any]], path: Path) -> None:
    """Draw a run on samples: its rewards, and below how long, how varied and how far from the base
    its answers are."""
    from matplotlib import pyplot

    below = {"answer_tokens": "tokens of an answer", "entropy": "entropy (nats)"}
    if any(line.get("kl") for line in steps):
        below["kl"] = "KL to the base"
    figure, axes = pyplot.subplots(
        *(1 + len(below), 1),
        figsize=(8, 3.4 + 1.4 * len(below)),
        sharex=True,
        height_ratios=(3, *[1] * len(below)),
        layout="constrained",
    )
    top, colours = axes[0], ("#b5482a", "#5a8f4e", "#8a5a9e", "#b08a2a")
    names = sorted({key for line in steps for key in line if key.startswith("reward/")})
    for name, colour in zip(names if len(names) > 1 else (), colours, strict=False):
        own = [(line["step"], line[name]) for line in steps if name in line]
        y = smoothed([value for _, value in own])
        label = name.removeprefix("reward/")
        top.plot([step for step, _ in own], y, "--", color=colour, linewidth=1.4, label=label)
    judged = [line for line in steps if "reward" in line]
    x, y = [line["step"] for line in judged], [line["reward"] for line in judged]
    top.plot(x, y, color="#9db4c8", linewidth=1, label="each step")
    top.plot(x, smoothed(y), color="#17517e", linewidth=2.2, label="reward, smoothed")
    if held_out:
        ex, ey = [line["step"] for line in held_out], [line["eval_reward"] for line in held_out]
        top.plot(ex, ey, "o--", color="#b5482a", linewidth=1.6, label="held-out prompts")
    top.set_ylabel("mean reward")
    top.legend(frameon=False)
    for place, (key, label) in zip(axes[1:], below.items(), strict=True):
        x = [line["step"] for line in steps]
        place.plot(x, [line[key] for line in steps], color="#5a5a5a", linewidth=1.4)
        place.set_ylabel(label, fontsize=8)
    axes[-1].set_xlabel("step")
    for place in axes:
        place.spines[["top", "right"]].set_visible(False)
        place.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def smoothed(values: list[float], memory: float = 0.85) -> list[float]:
    """Return, at each step, the mean of all values, with weights memory^distance to both sides."""

    def sums(terms: list[float]) -> list[float]:
        """Return Σ memory^(i - j) · term j over all j up to i, at each i."""
        return list(accumulate(terms, lambda total, term: memory * total + term))

    def both_sides(terms: list[float]) -> list[float]:
        ahead = sums(terms[::-1])[::-1]
        return [a + b - own for a, b, own in zip(sums(terms), ahead, terms, strict=True)]

    totals, weights = both_sides(values), both_sides([1.0] * len(values))
    return [total / weight for total, weight in zip(totals, weights, strict=True)]
