"""What a policy learns from samples, against sums written out from the papers in float64."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import torch

from veneer.adapter.method import Method
from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import pack
from veneer.errors import ConfigError
from veneer.objectives import policy
from veneer.objectives.config import Objective
from veneer.objectives.criterion import StepCounts
from veneer.objectives.on_policy import Drawn, PolicyCriterion
from veneer.objectives.policy_config import OnPolicy
from veneer.training.recipe import Recipe

NAN = math.nan
REWARDS = [[1.0, 0.0, 0.5, 0.0], [2.0, NAN, 1.0, 4.0], [1.0] * 4, [NAN, NAN, 3.0, NAN]]
LENGTHS = [3, 1, 4, 2]
ADVANTAGES = [1.5, -0.5, 0.0, -1.0]
CLIP = {"low": 0.2, "high": 0.3}


def advantage(group, i, *, others, scale):
    """Return an advantage as the papers have it, of the rewards that there are."""
    known = [x for x in group if not math.isnan(x)]
    if math.isnan(group[i]) or len(known) == 1:
        return 0.0
    if others:
        rest = [x for k, x in enumerate(group) if k != i and not math.isnan(x)]
        return group[i] - fmean(rest)
    difference = group[i] - fmean(known)
    return difference / (stdev(known) + 1e-4) if scale else difference


@pytest.mark.parametrize(("others", "scale"), [(False, True), (False, False), (True, False)])
def test_advantages_compare_the_answers_to_a_prompt(others, scale):
    ours = policy.advantages(
        torch.tensor(REWARDS, dtype=torch.float64),
        baseline="others" if others else "group",
        scale=scale,
    )
    own = [[advantage(group, i, others=others, scale=scale) for i in range(4)] for group in REWARDS]
    torch.testing.assert_close(ours, torch.tensor(own, dtype=torch.float64))


def test_long_answers_are_worth_less():
    lengths = torch.tensor([1, 6, 8, 9, 10])
    taken = policy.overlong_penalty(lengths, longest=10, margin=4)
    assert taken.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0]


def test_the_divergence_is_that_of_the_estimate():
    p, q = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    own = [math.exp(b - a) - (b - a) - 1 for a, b in zip(p.tolist(), q.tolist(), strict=True)]
    assert policy.divergence(p, q).tolist() == pytest.approx(own)


class Numbers:
    """Four samples in two batches, and all that is known of their tokens, in float64."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)

        def log_p():
            return -torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64) - 0.1

        self.log_p = log_p().requires_grad_(True)
        self.old, self.sampled, self.reference = log_p(), log_p(), log_p()
        self.examples = [
            Example([5, *[6] * n], [UNLABELLED, *[6] * n], f"row {n}", 0) for n in LENGTHS
        ]

    def of_rows(self, values):
        return [row.tolist() for row in values.split(LENGTHS)]

    def loss(self, config, *, of_answers=False, reference=True):
        """Return a step's loss by the criterion, over two batches in another order."""
        drawn = Drawn(
            ADVANTAGES,
            self.of_rows(self.sampled),
            self.of_rows(self.reference) if reference else None,
        )
        criterion = PolicyCriterion(config, drawn, of_answers)
        batches = [pack(self.examples, rows) for rows in ([2, 0], [3, 1])]
        own, old = self.log_p.split(LENGTHS), self.old.split(LENGTHS)
        counts = StepCounts(sum(LENGTHS), (4,))
        assert [criterion.counts(batch) for batch in batches] == [(2,), (2,)]
        total, metrics = torch.zeros((), dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for update in (old, own):
            outcomes = [
                criterion(-torch.cat([update[row] for row in batch.rows]), batch, counts)
                for batch in batches
            ]
        total = sum(outcome.loss for outcome in outcomes) / criterion.divisor(counts)
        metrics = sum(outcome.metrics for outcome in outcomes) / criterion.divisor(counts)
        return total, dict(zip(criterion.metrics, metrics.tolist(), strict=True)), criterion


def written_out(numbers, config, *, of_answers=False, reference=True):
    """Return the loss, summed token by token."""
    low, high = 1 - config.clip_low, 1 + config.clip_high
    rows = zip(
        *(values.split(LENGTHS) for values in (numbers.log_p, numbers.old)),
        *(numbers.of_rows(values) for values in (numbers.sampled, numbers.reference)),
        ADVANTAGES,
        strict=True,
    )
    answers, tokens = [], []
    for log_p, old, sampled, theirs, A in rows:
        own = []
        whole = (log_p.sum() - old.sum()).exp()
        for t in range(len(log_p)):
            r = whole if of_answers else (log_p[t] - old[t]).exp()
            loss = -torch.min(r * A, r.clamp(low, high) * A)
            if config.importance_cap:
                loss = loss * min(math.exp(float(old[t]) - sampled[t]), config.importance_cap)
            if reference and not of_answers:
                d = theirs[t] - log_p[t]
                loss = loss + config.kl_weight * (d.exp() - d - 1)
            own.append(loss)
        answers.append(sum(own) / len(own))
        tokens += own
    if of_answers or config.loss_level == "answer":
        return sum(answers) / len(answers)
    return sum(tokens) / (len(tokens) if config.loss_level == "token" else 4 * 7)


CASES = {
    "grpo": (OnPolicy(clip_low=0.2, clip_high=0.2, kl_weight=0.04), {}),
    "dr_grpo": (OnPolicy(loss_level="budget", max_new_tokens=7), {"reference": False}),
    "dapo": (OnPolicy(loss_level="token", clip_high=0.28, importance_cap=1.2), {}),
    "rloo": (OnPolicy(kl_weight=0.05), {"of_answers": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_the_paper(name):
    config, options = CASES[name]
    numbers = Numbers()
    ours, metrics, criterion = numbers.loss(config, **options)
    own = written_out(numbers, config, **options)
    torch.testing.assert_close(ours, own)
    (gradient,) = torch.autograd.grad(ours, numbers.log_p)
    (expected,) = torch.autograd.grad(own, numbers.log_p)
    torch.testing.assert_close(gradient, expected)
    gaps = (numbers.old - numbers.sampled).abs()
    assert metrics["sampler_gap"] == pytest.approx(gaps.mean().item())
    bias = (numbers.old - numbers.sampled).mean().item()
    assert metrics["sampler_bias"] == pytest.approx(bias)
    assert criterion.largest_gap.item() == pytest.approx(gaps.max().item())
    assert (0 < metrics["clipped"] < 1) == (name != "rloo")  # of whole answers none is clipped here
    if options.get("reference", True):
        kl = policy.divergence(numbers.log_p, numbers.reference).mean().item()
        assert metrics["kl"] == pytest.approx(kl)
    else:
        assert metrics["kl"] == 0


def test_the_first_update_is_measured_from_itself():
    """Its ratios are 1, so that the gradient is −A / tokens and nothing is clipped."""
    numbers = Numbers()
    criterion = PolicyCriterion(OnPolicy(), Drawn(ADVANTAGES, numbers.of_rows(numbers.sampled)))
    batch = pack(numbers.examples, range(4))
    outcome = criterion(-numbers.log_p, batch, StepCounts(sum(LENGTHS), (4,)))
    (gradient,) = torch.autograd.grad(outcome.loss, numbers.log_p)
    own = np.repeat([-A / n for A, n in zip(ADVANTAGES, LENGTHS, strict=True)], LENGTHS)
    torch.testing.assert_close(gradient, torch.from_numpy(own))
    assert outcome.metrics[1] == 0


def test_settings_that_cannot_be_are_listed_at_once():
    with pytest.raises(ConfigError, match=r"group_size is 0.*loss_level is 'row'"):
        OnPolicy(group_size=0, loss_level="row")
    with pytest.raises(ConfigError, match="reward_weights has 1 numbers for 2 rewards"):
        OnPolicy(reward=("exact", "tests"), reward_weights=(1.0,))
    with pytest.raises(ConfigError, match=r"reward_weights.*a number, each; reward_seconds.*above"):
        OnPolicy(reward=("exact", "tests"), reward_weights=(1.0, math.nan), reward_seconds=(1, 0))
    with pytest.raises(ConfigError, match=r"reward is \(7,\), but must be a text, each"):
        OnPolicy(reward=7)
    with pytest.raises(ConfigError, match="overlong_margin is more than max_new_tokens"):
        OnPolicy(overlong_margin=300)
    with pytest.raises(ConfigError, match="grpo learns from what rewards say of samples"):
        Recipe("m", Path("d"), objective=Objective("grpo"))
    with pytest.raises(ConfigError, match="group_size would do nothing with sft"):
        Recipe("m", Path("d"), on_policy=OnPolicy(group_size=4))
    with pytest.raises(ConfigError, match="draws samples with an adapter of low rank"):
        Recipe(
            *("m", Path("d"), Method("full")),
            objective=Objective("grpo"),
            on_policy=OnPolicy(reward="exact"),
        )
    assert OnPolicy(reward="exact").weights == (1.0,)
