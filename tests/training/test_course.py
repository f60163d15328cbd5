"""The settings of a run: the learning rate of each step, and every problem at once."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import veneer


@given(
    steps=st.integers(1, 300),
    warmup=st.sampled_from([0, 0.03, 0.1, 0.5, 0.9, 1, 3, 10, 400]),
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
)
def test_schedules(steps, warmup, schedule):
    course = veneer.TrainConfig(lr=2.0, warmup=warmup, schedule=schedule)
    rates = [course.lr_at(step, steps) for step in range(1, steps + 1)]
    rise = warmup if warmup >= 1 else round(warmup * steps)
    assert all(0 < rate <= 2.0 for rate in rates)
    assert rates[:rise] == [2.0 * step / rise for step in range(1, min(rise, steps) + 1)]
    falling = rates[rise:]
    if not falling:
        return
    assert falling[0] == 2.0
    if schedule == "constant":
        assert set(falling) == {2.0}
        return
    assert falling == sorted(falling, reverse=True)
    left = len(falling)
    for done, rate in enumerate(falling):
        share = done / left
        expected = 1 - share if schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
        assert abs(rate - 2.0 * expected) < 1e-12
    # One step more would be at zero.
    after = course.lr_at(steps + 1, steps)
    assert abs(after) < 1e-12


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0},
        {"epochs": math.inf},
        {"steps": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"warmup": -1},
        {"weight_decay": -0.1},
        {"clip": -1},
        {"tokens_per_step": 0},
        {"tokens_per_batch": 0},
        {"seed": -1},
        {"schedule": "steep"},
        {"save_every": 0},
        {"eval_every": -2},
        {"patience": 0},
    ],
    ids=str,
)
def test_courses_that_cannot_be(settings):
    with pytest.raises(veneer.ConfigError, match=next(iter(settings))):
        veneer.TrainConfig(**settings)


def test_all_problems_of_a_course_at_once():
    with pytest.raises(veneer.ConfigError) as caught:
        veneer.TrainConfig(lr=-1, steps=0, patience=0, schedule="x")  # type: ignore[arg-type]
    assert all(name in str(caught.value) for name in ("lr", "steps", "patience", "schedule"))
