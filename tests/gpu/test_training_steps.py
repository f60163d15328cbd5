"""Runs of the training loop on a GPU wait for it once in an evaluation, and in no step."""

import pytest

from gpu.training_cases import CASES, SLOW_CASES

EVENTS = ["Started", "Evaluated", "Step", "Step", "Evaluated", "Checkpointed", "Trained"]
BRIEF = ["Started", "Step", "Checkpointed", "Trained"]
GOING_ON = ["Notice", "Started", "Step", "Evaluated", "Checkpointed", "Trained"]
MATRIX = [name for name in CASES if name != "a reading in a step"]
# What waits nevertheless, by the kind and the way. Quantized experts are dequantized one by one for
# the rows that each has, which a notice says. A prefix before windows asks if rows have padding
# on their left, and the cache for it sends the window's length.
WAITS = {
    "falcon": ("modeling_falcon.py",),  # whose own code takes heads by a list of indices
    "nf4": ("lowrank/routing.py",),
    "prefix, padded": ("adapter/virtual_forward.py", "cache_utils.py"),
}


def check(case: str, result: dict) -> None:
    known = [place for kind, places in WAITS.items() if kind in case for place in places]

    def unknown(places: list[str]) -> list[str]:
        return [each for each in places if not any(place in each for place in known)]

    assert unknown(result["in_steps"]) == []
    readings = unknown(result["in_evaluations"])
    assert len(readings) == result["evaluations"]
    assert all("training/evaluate.py" in each for each in readings)
    assert result["devices"] == ["cuda:0"]
    assert result["dtypes"] in ([], ["torch.bfloat16"])


@pytest.mark.parametrize("case", MATRIX)
def test_no_step_waits(case, pretend):
    result = pretend("training_cases", case)
    check(case, result)
    is_brief = case != "llama, lora, packed"
    assert result["events"] == (BRIEF if is_brief else EVENTS + GOING_ON)


def test_one_reading_more_is_seen(pretend):
    (place,) = pretend("training_cases", "a reading in a step")["in_steps"]
    assert "_local_scalar_dense" in place


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES)
def test_no_step_of_any_model_waits(case, pretend):
    result = pretend("training_cases", case, "SLOW_CASES")
    check(case, result)
    assert result["events"] == EVENTS
