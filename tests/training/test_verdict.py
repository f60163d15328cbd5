"""The verdict on a run, from curves of loss of which everybody sees what became of it."""

import math
import random

import pytest

from veneer.training.events import Verdict
from veneer.training.verdict import judge, rate_advice

USUAL = 2e-4


def verdict(losses, held_out=None, *, lr: float = USUAL) -> Verdict:
    """Judge a run with these losses by step, and held-out losses at even distances from step 0."""
    lines = [{"step": i, "loss": loss, "lr": lr} for i, loss in enumerate(losses, 1)]
    for i, loss in enumerate(held_out or ()):
        lines.append({"step": i * len(losses) // (len(held_out) - 1), "eval_loss": loss})
    return judge(sorted(lines, key=lambda line: line["step"]), usual_lr=USUAL)


def noisy(losses, by: float) -> list[float]:
    """Return losses with a noise of up to ± `by`, which is the same each time."""
    return [loss + by * math.sin(12.9898 * i * i) for i, loss in enumerate(losses)]


def line(first: float, last: float, count: int) -> list[float]:
    return [first + (last - first) * i / (count - 1) for i in range(count)]


FALLING, FLAT, RISING = line(4, 2, 60), [4.0] * 60, line(4, 9, 60)
STEEP = [4 * 0.8**i + 0.1 for i in range(60)]
BACK = [*line(4, 1, 30), *line(1, 3.8, 30)]


def test_a_teacher_that_gives_what_the_base_gives_teaches_nothing():
    rounding = [1e-9, 0.0, 4e-8, 3e-7, 2e-6, 1e-9]
    for held_out in (None, [1e-9, 5e-8]):
        judged = verdict(rounding, held_out)
        assert judged.kind == "hardly learnt"
        assert "nothing to learn" in judged.text
    assert verdict([*rounding, 1.0], None).kind == "diverged"
    assert verdict([*rounding, math.nan], None).kind == "diverged"


@pytest.mark.parametrize(
    ("kind", "losses", "held_out"),
    [
        ("learnt", FALLING, None),
        ("learnt", STEEP, None),
        ("learnt", noisy(FALLING, 0.5), None),
        ("learnt", line(4, 2, 4), None),
        ("learnt", [4.1, 1.9], None),
        ("learnt", FALLING, [4.0, 3.0, 2.1, 2.1]),
        ("learnt", noisy(FLAT, 2), [4.0, 3.0, 2.1, 2.0]),  # held-out rows say it better
        ("learnt", BACK, [4.0, 3.0, 2.1, 2.0]),
        ("hardly learnt", FLAT, None),
        ("hardly learnt", [4.134, 4.153], None),
        ("hardly learnt", [4.134], None),
        ("hardly learnt", line(4, 3.9, 60), None),
        ("hardly learnt", noisy(line(4, 3.5, 30), 2), None),  # the noise may be all of it
        ("hardly learnt", noisy(FLAT, 1), None),
        ("hardly learnt", [0.0] * 9, None),
        ("hardly learnt", FLAT, [4.0, 3.9, 3.9]),
        ("hardly learnt", FALLING, [4.0, 4.05, 4.1]),
        ("overfitted", FALLING, [4.0, 3.0, 2.5, 2.7]),
        ("overfitted", FALLING, [4.0, 4.5, 5.0]),
        ("diverged", RISING, None),
        ("diverged", noisy(RISING, 0.5), None),
        ("diverged", [4.1, 9.3], None),
        ("diverged", BACK, None),
        ("diverged", [*FALLING, math.nan, math.nan, math.nan], None),
        ("diverged", [], None),
        ("diverged", RISING, [4.0, 3.5, 9.0]),
        ("diverged", BACK, [4.0, 1.1, 3.9]),
        ("diverged", FLAT, [4.0, 5.0, 6.0]),
        ("diverged", FALLING, [4.0, 3.0, math.nan]),
        ("diverged", FALLING, [4.0, 3.0, math.inf]),
    ],
)
def test_the_kind(kind, losses, held_out):
    given = verdict(losses, held_out)
    assert given.kind == kind, given.text
    assert given.text.lower().removeprefix("the run ").startswith(kind)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("losses", [FALLING, FLAT, RISING, BACK, noisy(FLAT, 1)])
def test_a_scale_of_all_losses_changes_nothing(losses, scale):
    assert verdict([scale * loss for loss in losses]).kind == verdict(losses).kind


def test_noise_alone_is_neither_learnt_nor_diverged():
    kinds = [verdict(noisy([4.0] * count, by)).kind for count in range(4, 200) for by in (0.3, 2)]
    assert kinds.count("hardly learnt") > 0.85 * len(kinds)  # at 95 % in each direction


def test_the_figures_and_the_weights_that_are_kept():
    text = verdict(FALLING, [4.0, 3.0, 2.5, 2.7]).text
    assert text.startswith("Overfitted after step 40: held-out loss 4.000 → 2.500 → 2.700, while")
    assert "while training loss 3.949 → 2.051 (-48.1%)." in text
    assert "weights kept are those of step 40" in text
    text = verdict(FALLING, [4.0, 4.5, 5.0]).text
    assert "from the start: held-out loss 4.000 → 5.000 (+25.0%), while" in text
    assert "weights from before are kept" in text
    assert "weights" not in verdict(FALLING, [4.0, 3.0, 2.0]).text
    assert "--eval-rows" in verdict(FALLING).text
    assert "by heart" not in verdict(FALLING).text
    assert "by heart: ask it something new" in verdict([*FALLING, *[0.05] * 9]).text
    assert "by heart" not in verdict([*FALLING, *[0.05] * 9], [4.0, 0.05]).text


def test_a_run_that_hardly_learnt_is_told_how_to_learn_more():
    text = verdict([4.134, 4.153]).text
    assert "training loss 4.134 → 4.153 (+0.5%) in 2 steps" in text
    assert "--steps 60" in text
    assert "--lr 0.0004" in text
    assert "--steps 180" in verdict(FLAT).text
    assert "--lr" not in verdict(FLAT, lr=4e-4).text
    for far in (0.01, 1e-9):
        text = verdict(FLAT, lr=far).text
        assert f"--lr is {far:.2g}; leave it out, and 0.0002 is chosen" in text
        assert "--steps" not in text
    assert "4.000 → 4.200" in verdict(FLAT, [4.0, 4.1, 4.2]).text  # not "4.000 → 4.000"


def test_a_run_that_diverged_is_told_from_where_and_the_likely_cause():
    text = verdict(BACK, lr=5e-3).text
    assert "--lr is 0.005; leave it out, and 0.0002 is chosen" in text
    text = verdict(BACK, lr=9e-4).text
    assert text.startswith("The run diverged after step 32: training loss 3.845 → 1.050 → 3.655.")
    assert "--lr is 0.0009, try 9e-05" in text
    assert "weights are those of the end" in text
    text = verdict(BACK, [4.0, 1.1, 3.9], lr=1e-5).text
    assert "weights kept are those of step 30" in text
    assert "try" not in text.split("--lr is 1e-05, which is low")[0]
    assert "--dtype float32" in text
    assert "a:7" in rate_advice(1e-5, USUAL, rows="a:7")
    assert "a:7" in rate_advice(1, USUAL, rows="a:7")


@pytest.mark.parametrize(
    ("rewards", "equal", "kind", "says"),
    [
        ([0.1, 0.12, 0.2, 0.4, 0.6, 0.7, 0.8, 0.82], 0.1, "learnt", "reward 0.110 → 0.810"),
        ([0.8, 0.78, 0.6, 0.5, 0.4, 0.2, 0.1, 0.1], 0.1, "diverged", "--kl-weight"),
        ([0.1, 0.12, 0.09, 0.11, 0.1, 0.12, 0.1, 0.11], 0.1, "hardly learnt", "--group-size"),
        ([0.0] * 8, 0.9, "hardly learnt", "In 90% of the groups all answers have one reward"),
    ],
)
def test_a_run_on_samples_is_judged_by_its_rewards(rewards, equal, kind, says):
    lines = [
        {"step": i, "loss": 0.0, "lr": 1e-4, "reward": reward, "equal_groups": equal}
        for i, reward in enumerate(rewards, 1)
    ]
    verdict = judge(lines, usual_lr=1e-4)
    assert verdict.kind == kind
    assert says in verdict.text


@pytest.mark.parametrize("steps", [4, 8, 60])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_luck_is_seldom_taken_for_learning(share, steps):
    """Answers succeed by chance alone: hardly ever in some runs, where most changes are none."""
    kinds = []
    for seed in range(100):
        chance = random.Random(seed)
        rewards = [sum(chance.random() < share for _ in range(8)) / 8 for _ in range(steps)]
        lines = [
            {"step": i, "loss": 0.0, "lr": 1e-4, "reward": reward, "equal_groups": 0.5}
            for i, reward in enumerate(rewards, 1)
        ]
        kinds.append(judge(lines, usual_lr=1e-4).kind)
    assert kinds.count("hardly learnt") >= 85
    assert kinds.count("diverged") <= 2


def test_a_run_whose_rewards_all_failed_is_not_judged_by_its_loss():
    lines = [{"step": i, "loss": 1.0 / i, "lr": 1e-4, "equal_groups": 1.0} for i in range(1, 9)]
    verdict = judge(lines, usual_lr=1e-4)
    assert verdict.kind == "hardly learnt"
    assert "the rewards failed" in verdict.text
