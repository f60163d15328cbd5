"""What a reference gives the rows is kept for whoever trains on the same ones, and nobody else."""

import numpy as np
import pytest

import veneer
from support.pairs import pairs
from support.tiny_models import tiny
from veneer.fused.forward import choose_forward
from veneer.objectives.config import Objective
from veneer.processes.world import ALONE
from veneer.training import reference

ROWS = pairs(3)
OF_RUN = {"base": {"weights": "a"}, "data": "b"}


@pytest.fixture(scope="module")
def model_and_forward():
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2))
    return model, choose_forward(model, ROWS)[0]


@pytest.fixture
def measured(model_and_forward, tmp_path, monkeypatch):
    """Return a function for what the reference gives rows, and whether that was computed."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    model, forward = model_and_forward
    computed = []
    real = reference.log_probabilities

    def log_probabilities(*args, **options):
        computed.append(True)
        return real(*args, **options)

    monkeypatch.setattr(reference, "log_probabilities", log_probabilities)

    def measure(rows=ROWS, objective=Objective("dpo"), **identity):  # noqa: B008 (frozen)
        computed.clear()
        (criterion,) = reference.criteria_over(
            *(objective, {"train": rows}, model, forward),
            **{"identity": OF_RUN | identity, "world": ALONE, "tokens_per_batch": 64},
        )
        return criterion.reference, bool(computed)

    return measure


def test_numbers_are_kept_for_the_same_rows_and_base(measured):
    first, was_computed = measured()
    again, was_computed_again = measured()
    assert (was_computed, was_computed_again) == (True, False)
    assert np.array_equal(first, again)


@pytest.mark.parametrize(
    "other", [{"base": {"weights": "c"}}, {"data": "d"}, {"bits": 4}, {"method": "full"}]
)
def test_others_have_numbers_of_their_own(measured, other):
    measured()
    assert measured(**other)[1]


def test_a_reference_that_is_the_start_is_never_kept(measured):
    start = Objective("dpo", reference="start")
    assert measured(objective=start)[1]
    assert measured(objective=start)[1]


def test_what_is_kept_and_broken_is_computed_again(measured, tmp_path):
    first, _ = measured()
    (kept,) = tmp_path.rglob(reference.FILE)
    kept.write_bytes(kept.read_bytes()[:-4])
    again, was_computed = measured()
    assert was_computed
    assert np.array_equal(first, again)
