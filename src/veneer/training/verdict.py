"""What became of a run, judged by its losses alone: learnt, hardly learnt, overfitted, diverged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from veneer.training.events import Verdict

# A change of loss by less than this share is nothing that a reader of the answers would notice.
LITTLE = 0.05
# Held-out rows are the same each time, so their loss is nearly without noise: 3 % above the best is
# a rise, less is the last steps' trembling.
ROSE = 0.03
# A run has lost its way when its training loss has gone back up by half of what it had gone down.
WENT_BACK = 0.5
# Training loss is compared as means of the first and the last 5 % of the steps, in a short run of a
# quarter of them, up to four: each step has other rows.
WINDOW, SHORT_WINDOW, MOST_IN_SHORT = 0.05, 0.25, 4
# Two means differ where they are two standard errors apart, as in any test at 95 %. With fewer
# steps than this the error is not known, and only half of the loss is a difference.
STANDARD_ERRORS, FEW_STEPS, CLEAR = 2.0, 4, 0.5
# Rewards of fewer steps than these say little of their own noise: no difference is believed. That a
# run has lost its way, which ends it in an error, has to be clearer than that it has learnt.
FEW_REWARDS, SURE = 8, 1.5
# σ of a noise is 1.048 times the median difference of neighbours: they differ by √2 σ · N(0, 1),
# whose absolute value has the median 0.6745. The median does not see the few steps of a steep fall.
SIGMA = 1.048
# A rate below a fifth of the usual one (1e-4 where that is 5e-4) seldom makes a run diverge.
SMALL_RATE = 0.2
# Nats a token. The mean token of an answer is then given nine tenths or more, as is seldom so for
# rows that were not learnt by heart.
BY_HEART = 0.1
# Nats. Where no loss is larger there was nothing to learn, as from a teacher that is the base.
NOTHING = 1e-4
# More than this many times the usual one is far above it.
LARGE_RATE = 5
# Where more groups than these have answers of one reward, that is what a run lacks.
MOSTLY_EQUAL = 0.5
# What a run that hardly learnt is advised to take: this many times its steps, but some at least.
LONGER, LEAST_STEPS = 3, 60


def judge(lines: Sequence[Mapping[str, Any]], *, usual_lr: float) -> Verdict:
    """Return the verdict on a run that has ended.

    lines: of metrics.jsonl, in their order; usual_lr: the learning rate that suits the method.
    Held-out loss decides where it was measured at least twice, training loss otherwise; of a run on
    samples, their rewards.
    """
    steps = [line for line in lines if "loss" in line]
    if any("equal_groups" in line for line in steps):
        return _by_rewards(steps, [line for line in lines if "eval_reward" in line])
    evaluations = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    if not steps:
        return Verdict("diverged", "The run diverged: no step had a finite loss and gradient.")
    losses = [line["loss"] for line in steps] + [loss for _, loss in evaluations]
    if all(loss <= NOTHING for loss in losses):
        return Verdict(
            "hardly learnt",
            f"Hardly learnt: there was nothing to learn, as no loss was above {NOTHING:g}. Rows, "
            "or a teacher, that say what the base says already teach nothing.",
        )
    course = _Course(steps)
    if held_out := len(evaluations) > 1:
        what, (start, first), (end, last) = "held-out loss", evaluations[0], evaluations[-1]
        finite = [(loss, step) for step, loss in evaluations if math.isfinite(loss)]
        best, best_step = min(finite, default=(last, end))
        left_best = not last <= best * (1 + ROSE)  # not ">", which a NaN would pass
        diverged = left_best and (course.rose or not last <= first * (1 + LITTLE))
        overfitted = left_best and course.fell and not course.rose and math.isfinite(last)
        learnt = first - best >= LITTLE * first
        kept = f" The weights kept are those of step {best_step}, the best on held-out rows."
        if best_step == start:
            kept = " No step was better on held-out rows, so the weights from before are kept."
        elif best_step == end:
            kept = ""
    else:
        # Answers that a teacher follows are others in each step, and not learnt by heart.
        has_rows = not any("answer_tokens" in line for line in steps)
        flag = "--eval-rows" if has_rows else "--eval-data"
        what, first, last = "training loss", course.first, course.last
        best, best_step = last, steps[-1]["step"]
        diverged, overfitted, learnt = course.rose, False, course.fell
        kept = f" No rows are held out that would say more ({flag})."
        if has_rows and learnt and last < BY_HEART:
            kept = (
                " That is near zero, so the rows may be learnt by heart: ask it something new, or "
                "hold out rows (--eval-rows)."
            )
    lr = max(line["lr"] for line in steps)

    if overfitted:
        return Verdict(
            "overfitted",
            f"Overfitted {_after(best_step, best < first)}: "
            f"{_losses(what, first, best, last)}, while "
            f"{_losses('training loss', course.first, course.last)}.{kept} More rows help, fewer "
            "steps, a lower --lr or --rank.",
        )
    if diverged:
        low, turn = (best, best_step) if held_out else (course.lowest, course.turn)
        if not held_out:
            kept = f" The weights are those of the end; {flag} keeps the best."
        return Verdict(
            "diverged",
            f"The run diverged {_after(turn, low < first)}: {_losses(what, first, low, last)}. "
            f"{rate_advice(lr, usual_lr)}{kept}",
        )
    if learnt:
        return Verdict("learnt", f"Learnt: {_losses(what, first, best)}.{kept}")
    reached = last if held_out and best_step == start else best
    faster = f", or faster (--lr {2 * lr:.2g})" if lr <= usual_lr else ""
    advice = f"Train longer (--steps {max(LEAST_STEPS, LONGER * len(steps))}){faster}."
    if lr < SMALL_RATE * usual_lr or lr > LARGE_RATE * usual_lr:
        advice = f"Most likely that is the learning rate: {_usual_instead(lr, usual_lr)}."
    return Verdict(
        "hardly learnt",
        f"Hardly learnt: {_losses(what, first, reached)} in {len(steps)} steps.{kept} {advice}",
    )


def _by_rewards(
    steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> Verdict:
    """Return the verdict on a run on samples: whether the end's rewards are clearly higher.

    evaluations: those of held-out prompts, which decide whose weights are kept.
    """
    rewards = [line["reward"] for line in steps if "reward" in line]
    if not rewards:
        return Verdict(
            "hardly learnt", "Nothing was learnt: the rewards failed for all answers. Mend them."
        )
    size = max(math.ceil(WINDOW * len(rewards)), min(MOST_IN_SHORT, len(rewards) // 4), 1)
    first, last = fmean(rewards[:size]), fmean(rewards[-size:])
    # Most rewards may be 0, and so the median change: half of the mean squared change is σ² here.
    variance = fmean([(b - a) ** 2 for a, b in pairwise(rewards)] or [0.0]) / 2
    noise = STANDARD_ERRORS * math.sqrt(variance * 2 / size)
    if len(rewards) < FEW_REWARDS:
        noise = math.inf
    what = f"reward {first:.3f} → {last:.3f} in {len(steps)} steps"
    if len(evaluations) > 1:
        best = max(evaluations, key=lambda line: line["eval_reward"])
        start, reached = evaluations[0]["eval_reward"], best["eval_reward"]
        what += f", held-out reward {start:.3f} → {reached:.3f} at step {best['step']}, kept"
    if last - first > noise:
        return Verdict("learnt", f"Learnt: {what}. samples.html shows what was said.")
    if first - last > SURE * noise and last < CLEAR * first:
        advice = "Try a lower --lr, or a --kl-weight that holds the model to its base."
        return Verdict("diverged", f"The run diverged: {what}. {advice}")
    equal = fmean(line.get("equal_groups", 0.0) for line in steps)
    advice = "Train longer, or in larger groups (--group-size)."
    if equal > MOSTLY_EQUAL:
        advice = (
            f"In {equal:.0%} of the groups all answers have one reward, and nothing is learnt from "
            "these: ask what succeeds now and then, or reward a part of the way."
        )
    return Verdict("hardly learnt", f"Hardly learnt: {what}. {advice}")


def rate_advice(lr: float, usual_lr: float, *, rows: str = "the rows") -> str:
    """Return what to try after a run that diverged: a lower rate, unless it is low already."""
    if lr < SMALL_RATE * usual_lr:
        return (
            f"--lr is {lr:.2g}, which is low: rather suspect {rows}, or the dtype of the base (try "
            "--dtype float32)."
        )
    lower = f"--lr is {lr:.2g}, try {lr / 10:.2g}"
    if lr > LARGE_RATE * usual_lr:
        lower = _usual_instead(lr, usual_lr)
    return (
        f"Most likely the learning rate is too high: {lower}. If that does not help, look at "
        f"{rows}."
    )


def _usual_instead(lr: float, usual_lr: float) -> str:
    return f"--lr is {lr:.2g}; leave it out, and {usual_lr:.2g} is chosen"


class _Course:
    """How the training loss went, as means over windows of steps.

    fell, rose: whether the end is clearly below the start, or above it or half of the way back to
    it; turn: the step up to which it had gone down.
    """

    def __init__(self, steps: Sequence[Mapping[str, Any]]) -> None:
        losses = [line["loss"] for line in steps]
        count = len(losses)
        short = min(MOST_IN_SHORT, int(SHORT_WINDOW * count))
        size = max(math.ceil(WINDOW * count), short, 1)
        means = [fmean(losses[i : i + size]) for i in range(count - size + 1)]
        self.first, self.lowest, self.last = means[0], min(means), means[-1]
        self.turn: int = steps[means.index(self.lowest) + size - 1]["step"]
        noise = CLEAR * self.first
        if count >= FEW_STEPS:
            sigma = SIGMA * median(abs(b - a) for a, b in pairwise(losses))
            noise = STANDARD_ERRORS * sigma * math.sqrt(2 / size)
        least = max(LITTLE * self.first, noise)
        self.fell = self.first - self.last > least
        fall, back = self.first - self.lowest, self.last - self.lowest
        # The lowest of many means is low by chance too, so twice the noise.
        went_back = fall > least and back > max(WENT_BACK * fall, 2 * least)
        self.rose = went_back or not self.last - self.first <= least  # a NaN has risen too


def _after(step: int, got_better: bool) -> str:
    return f"after step {step}" if got_better else "from the start"


def _losses(what: str, first: float, *later: float) -> str:
    """Return "held-out loss 4.134 → 2.010 (-51.4%)", or "4.134 → 2.010 → 2.413"."""
    later = tuple(dict.fromkeys(later if later[0] != first else later[1:] or later))
    share = f" ({later[0] / first - 1:+.1%})" if first and len(later) == 1 else ""
    return f"{what} {' → '.join(f'{loss:.3f}' for loss in (first, *later))}{share}"
