"""What a search varies: ranges and values, what is wrong with them, and the recipes they give."""

from __future__ import annotations

from pathlib import Path

import pytest

import veneer
from veneer.training.search.space import (
    Range,
    Values,
    few_of,
    grid_of,
    space_of,
    usual_values,
    with_values,
)

RECIPE = veneer.Recipe("base", Path("rows.jsonl"), training=veneer.TrainConfig(lr=2e-4))


def test_ranges_and_values_of_each_kind():
    over = {
        "lr": "1e-4..3e-3",
        "--lora-plus-ratio": "2..8",
        "rank": "4,8,16,64",
        "expert_rank": "2..32",
        "targets": "attention,q_proj+v_proj",
        "dora": "true,false",
        "dropout": [0, 0.1],
    }
    assert space_of(over, RECIPE) == {
        "lr": Range(1e-4, 3e-3, log=True, whole=False),
        "lora_plus_ratio": Range(2, 8, log=False, whole=False),
        "rank": Values((4, 8, 16, 64)),
        "expert_rank": Range(2, 32, log=True, whole=True),
        "targets": Values(("attention", "q_proj+v_proj")),
        "dora": Values((True, False)),
        "dropout": Values((0.0, 0.1)),
    }


def test_all_that_is_wrong_is_said_at_once():
    over = {
        "lr": "3e-3..1e-4",
        "rnk": "4,8",
        "steps": "10..20",
        "rank": "0,8",
        "expert_rank": "1.5..3",
        "dropout": "0..1",
        "targets": " , ",
        "init": "pissa,zeros",
        "device": "cpu,cuda",
        "alpha": 16,
        "seed": [[1], [2]],
        "clip": "1...5",
        "lora-plus-ratio": "2..8",
        "lora_plus_ratio": "4..16",
    }
    with pytest.raises(veneer.ConfigError) as refused:
        space_of(over, RECIPE)
    for text in (
        "lr=3e-3..1e-4 is no range; give two numbers, the lower one first, as A..B",
        "'rnk' cannot be varied; did you mean 'rank'?",
        "steps is the same for all trials; give --steps",
        "rank=0: This adapter cannot be: rank is 0",
        "expert_rank=1.5..3 is no range; give two whole numbers",
        "dropout=1.0: This adapter cannot be: dropout is 1.0",
        "targets has no values",
        "init=zeros: This adapter cannot be: init is 'zeros'",
        "'device' cannot be varied",
        "alpha is 16; give a text, or a sequence of numbers",
        "seed is [[1], [2]]; give a text",
        "clip=1...5 is no range",
        "lora_plus_ratio is given twice",
    ):
        assert text in str(refused.value)
    with pytest.raises(veneer.ConfigError, match=r"targets is \(5,\), but must be names"):
        space_of({"targets": [5, "all"]}, RECIPE)
    with pytest.raises(veneer.ConfigError, match="nothing is varied"):
        space_of({}, RECIPE)


def test_alpha_stays_in_proportion_to_the_rank_unless_it_was_given():
    assert with_values(RECIPE, {"rank": 64, "lr": 1e-3}).lora.alpha == 128
    own = veneer.Recipe("base", Path("rows.jsonl"), lora=veneer.LoRA(rank=8, alpha=8))
    assert with_values(own, {"rank": 64}).lora.alpha == 8
    assert with_values(RECIPE, {"alpha": 4.0, "rank": 2}).lora.alpha == 4


def test_names_of_one_value_are_targets_of_one_trial_and_patterns_stay_whole():
    assert with_values(RECIPE, {"targets": "q_proj+v_proj"}).lora.targets == ("q_proj", "v_proj")
    assert with_values(RECIPE, {"targets": "re:.*q+"}).lora.targets == ("re:.*q+",)


def test_a_text_is_no_range_and_no_number():
    over = {"targets": r"re:.*layers\.[01]\..*,all", "layers": "3,0:2"}
    assert space_of(over, RECIPE) == {
        "targets": Values((r"re:.*layers\.[01]\..*", "all")),
        "layers": Values(("3", "0:2")),
    }


def test_few_combinations_are_all_of_them():
    space = space_of({"rank": "2..3", "dora": "true,false"}, RECIPE)
    pairs = [{"rank": rank, "dora": dora} for rank in (2, 3) for dora in (True, False)]
    assert few_of(space, most=4) == pairs
    assert few_of(space, most=3) == []
    assert few_of(space_of({"rank": "1..2000000"}, RECIPE), most=9) == []
    assert few_of(space_of({"rank": "1,2", "lr": "1e-3..2e-3"}, RECIPE), most=9) == []


def test_the_first_trial_is_the_recipe_itself_where_the_ranges_have_it():
    over = {"lr": "1e-4..1e-3", "rank": "4,8", "targets": ["attention", "all"]}
    usual = {"lr": 2e-4, "rank": 8, "targets": "attention"}
    assert usual_values(RECIPE, space_of(over, RECIPE)) == usual
    assert usual_values(RECIPE, space_of({"rank": "2,4"}, RECIPE)) is None
    assert usual_values(RECIPE, space_of({"lr": "1e-3..1e-2"}, RECIPE)) is None


def test_a_grid_has_every_combination_and_takes_no_range():
    space = space_of({"rank": "4,8", "lr": [1e-3, 2e-3]}, RECIPE)
    assert grid_of(space, most=4) == [{"rank": r, "lr": lr} for r in (4, 8) for lr in (1e-3, 2e-3)]
    with pytest.raises(veneer.ConfigError, match="give those of lr as A,B,C"):
        grid_of(space_of({"rank": "4,8", "lr": "1e-3..2e-3"}, RECIPE), most=9)
    with pytest.raises(veneer.ConfigError, match="is 4 trials; give --trials 4"):
        grid_of(space, most=3)
