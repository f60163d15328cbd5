"""Adapters that replace weights of the base, or adapt experts and convolutions, obey the laws of A
and B: merged equals unmerged, a mix is the mix of the changes, and the base does not change."""

from pathlib import Path

import pytest
import torch
from torch import nn

import veneer
from support.closeness import assert_no_further
from support.peft_cases import CASES, base, logits, theirs, written
from support.plain import Float64
from support.random_adapters import copy_of, same, snapshot


def loaded(case: str, place: Path) -> nn.Module:
    kind, options = CASES[case]
    written(theirs(kind, options), place)
    return veneer.load(base(kind), place)


def test_a_bias_without_a_place_is_not_merged(tmp_path):
    with pytest.raises(veneer.AdapterError, match=r"has a bias over model\.layers\.0"):
        veneer.merge(loaded("lora_bias alone", tmp_path))


def test_tied_rows_stay_tied_when_merged(tmp_path):
    plain = veneer.merge(loaded("tokens, tied", tmp_path))
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert plain.config.tie_word_embeddings


PAIRS = [
    ("saved norms and an mlp", "linear"),
    ("saved norms and an mlp", "saved head, tied"),
    ("tokens, tied", "embedding, tied"),
    ("tokens, tied", "tokens of both, tied no more"),
    ("bias lora_only", "both biases"),
    ("tokens of both", "all at once"),
    ("experts", "one stack of experts"),
    ("Conv2d", "bias, Conv2d"),
    ("saved classifier", "lora_bias, Conv2d"),
]


@pytest.mark.parametrize("cases", PAIRS, ids=" and ".join)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0)])
@pytest.mark.thinned
def test_a_mix_is_the_mix_of_the_changes(cases, weights, tmp_path):
    (kind, _), (other, _) = (CASES[case] for case in cases)
    assert kind == other
    model = base(kind)
    own = snapshot(model)
    names = ("a", "b")
    total = {key: weight.double() for key, weight in own.items()}
    for case, name, share in zip(cases, names, weights, strict=True):
        written(theirs(kind, CASES[case][1]), tmp_path / name)
        veneer.load(model, tmp_path / name, name=name)
        alone = snapshot(veneer.merge(veneer.load(base(kind), tmp_path / name)))
        for key in total:
            total[key] += share * (alone[key].double() - own[key].double())
    veneer.use(model, dict(zip(names, weights, strict=True)))
    wanted = untied(kind)
    wanted.load_state_dict({key: weight.float() for key, weight in total.items()})
    exact = untied(kind).double()
    exact.load_state_dict(total)
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")  # the only one that knows float64
    with Float64():
        expected = logits(exact, kind)
    assert_no_further(logits(model, kind), logits(wanted, kind), expected)
    assert_no_further(logits(veneer.merge(model), kind), logits(wanted, kind), expected)


def untied(kind: str) -> nn.Module:
    """Return the base with a head of its own."""
    model = base(kind)
    head = model.get_output_embeddings()
    if head is not None:
        head.weight = nn.Parameter(head.weight.detach().clone())
    return model


def test_a_layer_that_one_replaces_and_another_adapts_cannot_be_mixed(tmp_path):
    written(theirs("qwen2", CASES["saved head"][1]), tmp_path / "saved")
    model = veneer.load(base("qwen2"), tmp_path / "saved", name="saved")
    expected = logits(model, "qwen2")
    veneer.attach(model, veneer.LoRA(rank=2, targets=["lm_head"]), name="head")
    assert torch.equal(logits(model, "qwen2"), logits(base("qwen2"), "qwen2"))
    with pytest.raises(veneer.AdapterError, match=r"mixed.*lm_head\.weight"):
        veneer.use(model, {"saved": 1.0, "head": 1.0})
    assert veneer.in_use(model) == {"head": 1.0}
    veneer.use(model, "saved")
    assert torch.equal(logits(model, "qwen2"), expected)


def test_a_fresh_adapter_starts_from_the_base_whatever_acts(tmp_path):
    """PiSSA starts from W, also while another adapter replaces W."""
    model = loaded("saved norms and an mlp", tmp_path)
    config = veneer.LoRA(rank=2, targets=["gate_proj"], init="pissa", dora=True)
    veneer.attach(model, config, name="fresh", seed=0)
    alone = veneer.attach(base("llama"), config, name="fresh", seed=0)
    assert torch.equal(logits(model, "llama"), logits(alone, "llama"))
    veneer.detach(model, "fresh")
    veneer.use(model, "default")
    assert torch.equal(
        logits(model, "llama"), logits(loaded("saved norms and an mlp", tmp_path), "llama")
    )


@pytest.mark.parametrize("case", ["saved as one", "bias all", "tokens, tied", "experts", "Conv2d"])
def test_many_swaps_leave_the_base_as_it_was(case, tmp_path):
    kind, _ = CASES[case]
    untouched = base(kind)
    model = loaded(case, tmp_path)
    expected = logits(model, kind)
    for _ in range(100):
        veneer.use(model, None)
        veneer.use(model, "default")
    assert torch.equal(logits(model, kind), expected)
    assert veneer.models.fingerprint.fingerprint(model) == veneer.models.fingerprint.fingerprint(
        untouched
    )
    veneer.detach(model)
    assert same(snapshot(model), snapshot(untouched))
    assert repr(model) == repr(untouched)


def test_a_16_bit_base_keeps_what_was_trained(tmp_path):
    """Saved weights and rows are computed with in the base's dtype, and kept in their own."""
    kind, options = CASES["all at once"]
    written(theirs(kind, options), tmp_path / "a")
    model = veneer.load(base(kind).to(torch.bfloat16), tmp_path / "a", force=True)
    veneer.save(model, tmp_path / "b", format="peft")
    again = veneer.load(base(kind), tmp_path / "b")
    wanted = veneer.load(base(kind), tmp_path / "a")
    assert torch.equal(logits(again, kind), logits(wanted, kind))


def test_copies_are_apart(tmp_path):
    model = loaded("saved norms and an mlp", tmp_path)
    expected = logits(model, "llama")
    twin = copy_of(model)
    veneer.use(twin, None)
    assert torch.equal(logits(model, "llama"), expected)
    assert torch.equal(logits(twin, "llama"), logits(base("llama"), "llama"))
