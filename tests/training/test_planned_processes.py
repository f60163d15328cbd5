"""What each process of a run needs, when the base is sharded, and what is refused."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from veneer import ConfigError, LoRA, Recipe, TrainConfig
from veneer.plan.config import PlanConfig
from veneer.plan.devices import DevicePlan
from veneer.plan.find import find_sizes
from veneer.plan.methods import adapted_layers
from veneer.plan.plan import make_plan
from veneer.training.planned_processes import dealt, share_out

preset = cache(find_sizes)


def plan_of(**settings):
    sizes = preset("llama-2-7b")
    return make_plan(PlanConfig(**settings), sizes, adapted_layers(sizes, LoRA()))


def refusal(plan, count, memory, **options):
    with pytest.raises(ConfigError) as refused:
        share_out(plan, count, memory, **options)
    return str(refused.value)


def test_auto_shards_only_what_does_not_fit_whole():
    plan = plan_of()
    peak = plan.memory.peak
    assert share_out(plan, 4, peak).sharded == "none"
    assert share_out(plan, 4, None).sharded == "none"
    assert share_out(plan, 4, peak - 1).sharded == "base"
    assert share_out(plan, 4, peak, shard="base").sharded == "base"
    sharded = share_out(plan, 4, peak - 1)
    assert sharded.of_one.memory.peak == sharded.peak < peak


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    plan = plan_of(max_length=512)
    text = refusal(plan, 4, plan.memory.peak - 1, shard="none")
    assert text.startswith(f"Each of 4 processes would need {plan.memory.peak / 1e9:.2f} GB")
    assert "; --shard base (" in text
    assert "--recompute selective (" in text
    assert "--processes 3 (" in text
    text = refusal(plan, 4, 5_000_000_000)
    assert "with a sharded base" in text
    assert "--bits 4" in text
    assert "No settings make it fit" in refusal(plan, 2, 10**8)
    assert share_out(plan, 2, 10**8, ignore=True).sharded == "base"


def test_processes_of_other_machines_are_not_taken_away(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    plan = plan_of()
    assert "--processes" not in refusal(plan, 4, plan.memory.peak - 1, shard="none")


def test_what_cannot_be_sharded_is_refused():
    assert "shard base needs" in refusal(plan_of(method="full"), 4, 10**12, shard="base")
    assert "shard base needs" in refusal(plan_of(), 1, 10**12, shard="base")
    stored = plan_of(method="qlora", mapped=True)
    assert "mapped from the disk" in refusal(stored, 4, 10**12, shard="base")


def test_cards_have_memory_of_their_own(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    plan = on_cards(plan_of(max_length=512))
    assert "--processes" not in refusal(plan, 4, plan.memory.peak - 1, shard="none")
    # What stays mapped for a processor is copied to each of them, or its shard.
    stored = on_cards(plan_of(method="qlora", mapped=True))
    whole = stored.memory.weights.value
    sharded = share_out(stored, 4, stored.memory.peak - 1)
    assert sharded.sharded == "base"
    assert whole / 4 < sharded.of_one.memory.weights.value < whole / 2


def test_a_process_gets_its_share_of_a_step_and_no_less_than_the_longest_row():
    training = TrainConfig(tokens_per_step=1024)
    recipe = Recipe(model="m", data=Path("d"), training=training)
    plan = plan_of(tokens_per_batch=1024, max_length=300)
    assert dealt(plan, recipe, [100] * 50, 1) is plan
    assert dealt(plan, recipe, [100] * 50, 2).config.tokens_per_batch == 500
    assert dealt(plan, recipe, [100] * 50, 8).config.tokens_per_batch == 300
    smaller = replace(recipe, training=replace(training, tokens_per_batch=256))
    assert dealt(replace_length(plan, 100), smaller, [100] * 50, 2).config.tokens_per_batch == 200
    # Tokens of a pass over several processes are those of the processes that share it.
    assert DevicePlan(plan, 2, pieces=2).of_one.config.tokens_per_batch == 512


def on_cards(plan):
    return make_plan(plan.config, plan.sizes, plan.adapted, on_card=True)


def replace_length(plan, length):
    return make_plan(replace(plan.config, max_length=length), plan.sizes, plan.adapted)
