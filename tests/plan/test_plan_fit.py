"""What fits: the gentlest settings that do."""

from functools import cache

import pytest

from veneer import LoRA
from veneer.plan.config import PlanConfig
from veneer.plan.find import find_sizes
from veneer.plan.fit import _seconds, alternatives, flags, gentlest
from veneer.plan.methods import adapted_layers
from veneer.plan.plan import make_plan, replanned

GB = 10**9


def plan_of(name, **settings):
    sizes = preset(name)
    return make_plan(PlanConfig(**settings), sizes, adapted_layers(sizes, LoRA(targets="all")))


preset = cache(find_sizes)


@pytest.mark.parametrize("free", [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 30])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama-2-7b", {}),
        ("llama-2-7b", {"max_length": 512, "recompute": "selective"}),
        ("llama-2-7b", {"method": "qlora"}),
        ("gpt2-xl", {"method": "full"}),
    ],
)
@pytest.mark.thinned
def test_the_proposal_fits_and_nothing_that_costs_less_does(name, settings, free):
    plan = plan_of(name, **settings)
    best = gentlest(plan, free * GB)
    for config in alternatives(plan):
        if best is not None and config == best.config:
            assert best.memory.peak <= free * GB
            return
        assert replanned(plan, config).memory.peak > free * GB
    assert best is None


def test_a_plan_that_fits_is_left_alone():
    plan = plan_of("llama-2-7b")
    assert gentlest(plan, 100 * GB) == plan
    assert flags(plan.config, plan.config) == ""


def test_what_costs_time_alone_is_tried_before_fewer_bits():
    plan = plan_of("llama-2-7b")
    tried = list(alternatives(plan))
    assert tried[0] == plan.config
    bases = [(config.bits, config.mapped) for config in tried]
    assert list(dict.fromkeys(bases)) == [(None, False), (8, False), (4, False), (4, True)]
    first = [config for config in tried if config.bits is None]
    assert [_seconds(config) for config in first] == sorted(map(_seconds, first))
    assert flags(tried[0], tried[1]) == "--recompute selective"


def test_full_training_is_never_offered_bits_or_what_would_not_apply():
    tried = list(alternatives(plan_of("gpt2-xl", method="full")))
    assert {config.bits for config in tried} == {None}
    assert {config.recompute for config in tried} == {"none", "full"}


def test_the_disk_is_taken_only_where_it_was_asked_for():
    tried = list(alternatives(plan_of("llama-2-7b", recompute="disk")))
    assert {config.recompute for config in tried} == {"disk", "full"}
    tried = list(alternatives(plan_of("llama-2-7b")))
    assert {config.recompute for config in tried} == {"none", "selective", "full"}


def test_beside_a_mixture_the_disk_is_full_recomputation_and_nothing_is_offered_for_it():
    tried = list(alternatives(plan_of("qwen3-30b-a3b", recompute="disk")))
    assert {config.recompute for config in tried} == {"disk"}


def test_passes_are_not_made_shorter_than_a_row():
    tried = alternatives(plan_of("llama-2-7b", max_length=512))
    assert min(config.tokens_per_batch for config in tried) == 512


def test_flags_name_what_changed():
    after = PlanConfig(recompute="full", tokens_per_batch=512, bits=4, mapped=True)
    expected = "--recompute full --tokens-per-batch 512 --bits 4 --mapped"
    assert flags(PlanConfig(), after) == expected
