"""A LoRA's settings: its scaling, and all that is wrong with them at once."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import veneer


@given(rank=st.integers(1, 512), alpha=st.floats(0.1, 1e4))
def test_scaling(rank, alpha):
    assert veneer.LoRA(rank=rank, alpha=alpha).scaling_of("x") == alpha / rank
    root = veneer.LoRA(rank=rank, alpha=alpha, rslora=True).scaling_of("x")
    assert abs(root - alpha / rank**0.5) <= 1e-12 * root
    assert veneer.LoRA(rank=rank).alpha == 2 * rank


def test_numbers_of_numpy_become_python_s():
    config = veneer.LoRA(
        rank=np.int64(4),  # type: ignore[arg-type]
        alpha=np.float32(2),  # type: ignore[arg-type]
        rank_pattern={"q": np.int32(2)},  # type: ignore[dict-item]
    )
    assert config == veneer.LoRA(rank=4, alpha=2.0, rank_pattern={"q": 2})
    assert json.loads(json.dumps(asdict(config)))["rank"] == 4
    training = veneer.TrainConfig(steps=np.int64(3), lr=np.float64(1e-3))  # type: ignore[arg-type]
    assert [type(value) for value in (training.steps, training.lr)] == [int, float]
    with pytest.raises(veneer.ConfigError, match="rank"):
        veneer.LoRA(rank=np.bool_(True))  # type: ignore[arg-type]


def test_all_faults_of_a_configuration_at_once():
    with pytest.raises(veneer.ConfigError) as caught:
        veneer.LoRA(
            rank=0,
            alpha=-1,
            dropout=1.0,
            targets=[],
            init="zeros",  # type: ignore[arg-type]
            rank_pattern={"(": 0},
            alpha_pattern={"q": float("inf"), "[": 1.0},
        )
    message = str(caught.value)
    for problem in (
        "rank is 0",
        "alpha is -1",
        "dropout is 1.0",
        "targets is empty",
        "init is 'zeros'",
        "rank_pattern['('] is 0",
        "alpha_pattern['q'] is inf",
        "the pattern '(' is no regular expression",
        "the pattern '[' is no regular expression",
    ):
        assert problem in message


@pytest.mark.parametrize(
    "faults",
    [
        {"rank": 1.5},
        {"rank": True},
        {"rank": "8"},
        {"alpha": float("nan")},
        {"alpha": 0},
        {"alpha": "8"},
        {"dropout": float("nan")},
        {"dropout": -0.1},
        {"dropout": "0"},
        {"targets": ""},
        {"targets": [None]},
        {"layers": 3},
        {"rank_pattern": [("q", 1)]},
        {"rslora": "yes"},
    ],
    ids=str,
)
def test_a_fault_of_a_configuration(faults):
    with pytest.raises(veneer.ConfigError, match=next(iter(faults))):
        veneer.LoRA(**faults)
