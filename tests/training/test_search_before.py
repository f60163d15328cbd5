"""A short search before a run: what it settles on, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import veneer
from veneer.run_directory import RunDirectory
from veneer.training.choose import usual_rate
from veneer.training.events import Notice
from veneer.training.search import auto
from veneer.training.search.result import Cost, Searched, SearchResult, TrialResult

RECIPE = veneer.Recipe("minigpt", Path("rows.jsonl"))
USUAL = TrialResult(0, {"lr": 1e-3}, "complete", {100: 2.0}, 9, 90, 9)


def settled(*trials: TrialResult) -> tuple[dict, str]:
    return auto.settled(SearchResult("m", "d", trials, Cost(1.0, 1, 1, None)))


def test_the_usual_values_stay_unless_others_are_clearly_better():
    assert settled(USUAL)[0] == {"lr": 1e-3}
    hardly = TrialResult(1, {"lr": 3e-3}, "complete", {100: 1.995})
    values, why = settled(hardly, USUAL)
    assert values == {"lr": 1e-3}
    assert "but hardly: 1.9950, 2.0000 with the usual lr 0.001, which is taken" in why
    values, why = settled(replace(hardly, losses={100: 1.5}), USUAL)
    assert values == {"lr": 3e-3}
    assert "Of 2 short trials lr 0.003 was best: evaluation loss 1.5000, 2.0000 with" in why


def test_usual_values_that_made_way_are_not_taken_however_near():
    left = replace(USUAL, state="pruned", losses={33: 1.99})
    best = TrialResult(1, {"lr": 3e-3}, "complete", {100: 1.995})
    values, why = settled(best, left)
    assert values == {"lr": 3e-3}
    assert "1.9900 with the usual lr 0.001 at 33 % of its steps, where it made way" in why
    with pytest.raises(veneer.TrainingError, match="give --lr and --rank"):
        settled(left)


@pytest.fixture
def searches(monkeypatch) -> list[dict]:
    """What is searched, of which rank 16 is the best."""
    seen: list[dict] = []

    def search(recipe, over, config, **options):
        seen.append({"recipe": recipe, "over": over, "config": config, **options})
        first = replace(USUAL, values=dict.fromkeys(over, 8))
        best = TrialResult(3, dict.fromkeys(over, 16), "complete", {100: 1.0})
        yield "", Searched(SearchResult("m", "d", (best, first), Cost(1.0, 1, 1, None)))

    monkeypatch.setattr(auto, "search", search)
    return seen


@pytest.fixture
def recipe(minigpt_home, tmp_path) -> veneer.Recipe:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    return veneer.Recipe(str(minigpt_home), rows, out=tmp_path / "out")


def test_a_rank_is_settled_at_the_rate_that_the_run_would_have(recipe, searches):
    events = auto.settle_by_search(recipe, ["rank"], should_stop=lambda: False)
    notices = []
    while True:
        try:
            notices.append(next(events)[1])
        except StopIteration as end:
            run = end.value
            break
    assert (run.lora.rank, run.lora.alpha, run.training.lr) == (16, 32, None)
    (search,) = searches
    assert search["over"] == {"rank": (4, 8, 16, 64)}
    assert search["recipe"].training.lr == usual_rate(recipe, minigpt_config(recipe))
    assert search["recipe"].out == recipe.out / "search"
    of_pairs = replace(recipe, objective=veneer.Objective("dpo"))
    assert 10 * usual_rate(of_pairs, minigpt_config(recipe)) == pytest.approx(0.005)
    assert isinstance(notices[-1], Notice)


def minigpt_config(recipe: veneer.Recipe):
    from veneer.models.load import load_config

    return load_config(recipe.model)


def test_a_run_that_goes_on_keeps_what_was_settled_and_searches_nothing(recipe, searches):
    recipe.out.mkdir()
    RunDirectory(recipe.out).write_recipe({"lr": 0.25, "rank": 3})
    events = auto.settle_by_search(recipe, ["lr", "rank"], resume=True)
    with pytest.raises(StopIteration) as end:
        next(events)
    run = end.value.value
    assert (run.training.lr, run.lora.rank, run.lora.alpha) == (0.25, 3, 6)
    assert not searches


def test_a_run_whose_recipe_is_damaged_is_searched_for_anew(recipe, searches):
    recipe.out.mkdir()
    RunDirectory(recipe.out).write_recipe({"rank": 3})
    list(auto.settle_by_search(recipe, ["lr"], resume=True))
    assert searches


def test_a_run_that_cannot_begin_is_refused_before_it_is_searched_for(recipe, searches):
    (recipe.out / "lora_adapter").mkdir(parents=True)
    with pytest.raises(veneer.ConfigError, match="holds an earlier run"):
        next(auto.settle_by_search(recipe, ["lr"]))
    assert not searches
