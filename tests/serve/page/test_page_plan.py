"""What the planner says of a preset: memory, passes and time."""

import pytest

import veneer
from support.random_adapters import tokenizer
from support.tiny_models import tiny
from veneer.serve.jobs.settings import TrainingBase
from veneer.serve.page.planned import Asked, planned


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    home = tmp_path_factory.mktemp("base")
    veneer.write_model(tiny("llama"), tokenizer(), home)
    return TrainingBase(str(home), "float32", device="cpu")


def test_passes_and_time_are_those_of_the_rows(base):
    without = planned(base, Asked(4, "all"), speed=100.0)
    assert (without["passes"], without["seconds"], without["why"]) == (None, None, None)
    assert without["memory"] > 0
    few = planned(base, Asked(4, "all", rows=24, tokens=240), speed=100.0)
    assert few["passes"] == 8  # what tune chooses for so few rows
    assert few["seconds"] == pytest.approx(8 * 240 / 100)
    asked = Asked(4, "all", rows=10**9, tokens=10**11, epochs=1.5)
    assert planned(base, asked, speed=1e6)["seconds"] == pytest.approx(1.5e5)
    assert planned(base, Asked(4, "all", rows=3, tokens=30), speed=None)["seconds"] > 0


def test_targets_that_match_nothing_have_no_plan(base):
    plan = planned(base, Asked(4, "attn", rows=3, tokens=30), speed=1.0)
    assert plan["parameters"] is None
    assert "attn" in plan["why"]
