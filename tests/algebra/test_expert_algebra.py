"""Adapters over stacks of experts are vectors as others are: summed, cut, measured, extracted."""

import pytest
import torch

import veneer
from support.adapter_states import model_with, states_of, written
from support.closeness import assert_same_logits
from support.random_adapters import distance, logits, shake
from support.tiny_models import tiny
from veneer.adapter.config import LoRA
from veneer.adapter.layers import lora_layers
from veneer.algebra.combine import combine
from veneer.algebra.extract import extract
from veneer.algebra.measure import diff, inspect
from veneer.errors import ConfigError
from veneer.formats.adapters import write
from veneer.formats.install import install

PAIR = (
    LoRA(rank=4, targets="all", expert_rank=2),
    LoRA(rank=2, targets="experts.gate_up_proj,q_proj", expert_rank=3, shared_expert_a=True),
)
SETTINGS = {
    "sum": {},
    "svd": {"method": "svd", "rank": 6, "expert_rank": 5},
    "ties of everything": {"method": "ties", "rank": 32, "expert_rank": 24, "density": 1.0},
    "dare of everything": {"method": "dare", "rank": 32, "expert_rank": 24, "density": 1.0},
    "prune nothing": {"method": "magnitude_prune", "rank": 32, "expert_rank": 24, "density": 1.0},
}


def deltas(model):
    return {path: layer.delta() for path, layer in lora_layers(model)}


def assert_nearest_to_means_of_those_that_agree(combined, fits, model):
    each = []
    for name, weight in (("0", 0.7), ("1", 0.3)):
        veneer.use(model, name)
        each.append({path: weight * delta for path, delta in deltas(model).items()})
    assert combined.keys() == each[0].keys() | each[1].keys()
    for fit in fits:
        changes = torch.stack([own[fit.path] for own in each if fit.path in own])
        agree = changes.sign() == changes.sum(0).sign()
        mean = (changes * agree).sum(0) / agree.sum(0).clamp(min=1)
        lost = max(0.0, 1 - fit.energy) ** 0.5  # cut to the rank
        assert distance(combined[fit.path], mean) == pytest.approx(lost, rel=0.01, abs=1e-3)


@pytest.mark.parametrize("architecture", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("case", SETTINGS)
def test_combined_stacks_add_what_both_add(architecture, case):
    model = model_with(architecture, *PAIR)
    combined = combine(states_of(model), (0.7, 0.3), **SETTINGS[case])
    other = tiny(architecture)
    install(other, combined.state)
    veneer.use(model, {"0": 0.7, "1": 0.3})
    if case == "ties of everything":
        assert_nearest_to_means_of_those_that_agree(deltas(other), combined.layers, model)
        return
    assert_same_logits(logits(other), model, logits)
    for fit in combined.layers:
        if fit.path.endswith("gate_up_proj"):
            assert fit.rank == SETTINGS[case].get("expert_rank", 5)
        assert fit.energy == pytest.approx(1.0)
        assert fit.norm == pytest.approx(float(deltas(model)[fit.path].norm()), rel=1e-4)


def test_a_rank_over_experts_follows_from_the_rank(tmp_path):
    states = states_of(model_with("mixtral", *PAIR))
    combined = combine(states, (1.0, 1.0), method="svd", rank=8)  # of 4 experts
    ranks = {fit.path.rpartition(".")[2]: fit.rank for fit in combined.layers}
    assert (ranks["q_proj"], ranks["gate_up_proj"], ranks["down_proj"]) == (
        6,
        2,
        2,
    )  # of 6, 5 and 2
    model = tiny("mixtral")
    install(model, combined.state)
    for format in ("native", "peft"):
        write(combined.state, tmp_path / format, format=format)
        again = veneer.load(tiny("mixtral"), tmp_path / format)
        assert torch.equal(logits(again), logits(model))


def test_an_a_that_all_share_stays_one():
    shared = LoRA(
        rank=2, targets="experts.gate_up_proj,q_proj", expert_rank=3, shared_expert_a=True
    )
    path = "model.layers.0.mlp.experts.gate_up_proj"
    for other, dimensions in ((shared, 2), (PAIR[0], 3)):
        model = model_with("mixtral", shared, other)
        combined = combine(states_of(model), (1.0, 0.5)).state
        assert combined.config.shared_expert_a == (dimensions == 2)
        stack = next(layer for layer in combined.layers() if layer.path == path)
        assert (stack.A.ndim, stack.B.ndim) == (dimensions, 3)
        again = tiny("mixtral")
        install(again, combined)
        veneer.use(model, {"0": 1.0, "1": 0.5})
        assert_same_logits(logits(again), model, logits)


def test_an_expert_rank_without_a_rank_is_refused():
    with pytest.raises(ConfigError, match="expert_rank would do nothing without a rank"):
        combine([], [], expert_rank=2)


def test_measures_of_a_stack_are_those_of_its_experts():
    model = model_with("mixtral", *PAIR)
    one, other = states_of(model)
    veneer.use(model, "0")
    ours = deltas(model)
    for measured in inspect(one):
        delta = ours[measured.path]
        assert measured.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        largest = float(torch.linalg.matrix_norm(delta, 2).max())
        assert measured.largest == pytest.approx(largest, rel=1e-4)
        assert 1 <= measured.effective_rank <= measured.rank + 1e-6
    veneer.use(model, "1")
    theirs = deltas(model)
    pairs = {pair.path: pair for pair in diff(one, other)}
    path = "model.layers.0.mlp.experts.gate_up_proj"
    assert pairs[path].inner == pytest.approx(float((ours[path] * theirs[path]).sum()), rel=1e-3)
    assert pairs["model.layers.0.mlp.experts.down_proj"].other is None


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    "settings", [{"rank": 8}, {"rank": 3, "expert_rank": 2}, {"energy": 0.99999}], ids=str
)
def test_a_known_change_of_experts_comes_back(architecture, settings, tmp_path):
    model = tiny(architecture)
    before = logits(model)
    base = written(model, tmp_path / "base")
    veneer.attach(model, LoRA(rank=2, targets="q_proj,experts.down_proj", expert_rank=2))
    shake(model)
    expected = logits(model)
    tuned = written(veneer.merge(model), tmp_path / "tuned")
    extracted = extract(base, tuned, **settings)
    assert extracted.uncovered == ()
    assert {fit.rank for fit in extracted.layers if fit.path.endswith("down_proj")} == {2}
    plain = veneer.load_base(base, dtype="float32")
    install(plain.model, extracted.state, tokenizer=plain.tokenizer)
    lost = max(1 - fit.energy for fit in extracted.layers) ** 0.5  # what the ranks leave out
    moved = expected - before
    # Behind two blocks, an error in the weights is at most some times as large in the logits.
    assert (logits(plain.model) - expected).norm() <= (10 * lost + 1e-5) * moved.norm()
