"""Norms, effective ranks and angles: laws that hold for any factors, and whole matrices beside."""

from dataclasses import replace

import pytest
import torch

import veneer
from support.adapter_states import model_with, states_of, whole
from support.tiny_models import tiny
from veneer.adapter.config import LoRA
from veneer.algebra.combine import combine
from veneer.algebra.measure import diff, inspect, is_dora, total_cosine, total_norm
from veneer.formats.capture import capture

CASES = {
    "llama": ("llama", LoRA(rank=3, targets="all")),
    "embedding": ("qwen2", LoRA(rank=3, targets="embed_tokens,v_proj")),
    "Conv1D": ("gpt2", LoRA(rank=3, targets="all", rslora=True)),
    "starts": ("llama", LoRA(rank=3, targets="all", init="pissa")),
}


@pytest.fixture(params=CASES)
def pair(request):
    architecture, config = CASES[request.param]
    return states_of(model_with(architecture, config, replace(config, rank=2, alpha=None)))


def changed(state, change):
    """Return the adapter with A and B of each layer as `change` makes them of those."""
    tensors = dict(state.tensors)
    for layer in state.layers():
        kind = "lora_embedding_" if layer.is_embedding else "lora_"
        for half, tensor in zip("AB", change(layer.A, layer.B), strict=True):
            tensors[f"{layer.path}.{kind}{half}"] = tensor
    return replace(state, tensors=tensors)


def test_norms_and_effective_ranks_are_those_of_the_whole(pair):
    state = pair[0]
    expected = whole(state)
    layers = inspect(state)
    assert {layer.path for layer in layers} == set(expected)
    for layer in layers:
        values = torch.linalg.svdvals(expected[layer.path])
        p = values[values > 1e-9 * values[0]] / values.sum()
        assert (layer.out, layer.in_) == tuple(expected[layer.path].shape)
        assert layer.norm == pytest.approx(float(values.norm()), rel=1e-5)
        assert layer.largest == pytest.approx(float(values[0]), rel=1e-5)
        assert layer.effective_rank == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-3)
        assert 1 <= layer.effective_rank <= layer.rank + 1e-6
    assert total_norm(layers) == pytest.approx(
        sum(float(x.norm()) ** 2 for x in expected.values()) ** 0.5
    )


def test_cosines_are_those_of_the_whole(pair):
    one, other = (whole(state) for state in pair)
    pairs = diff(*pair)
    for each in pairs:
        a, b = one[each.path].flatten(), other[each.path].flatten()
        assert each.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)
    a, b = (torch.cat([side[p.path].flatten() for p in pairs]) for side in (one, other))
    assert total_cosine(pairs) == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)


def test_an_adapter_is_itself_and_the_opposite_of_its_negative(pair):
    state = pair[0]
    minus = combine([state], [-2.0]).state
    for other, expected in ((state, 1.0), (minus, -1.0)):
        pairs = diff(state, other)
        assert [each.cosine for each in pairs] == pytest.approx([expected] * len(pairs), abs=1e-6)
        assert total_cosine(pairs) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("case", ["llama", "embedding", "Conv1D"])
def test_what_b_r_and_its_inverse_a_add_is_the_same(case):
    architecture, config = CASES[case]
    state, other = states_of(model_with(architecture, config, config))
    turn = torch.eye(3) + 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(4))
    same = changed(state, lambda A, B: (torch.linalg.inv(turn) @ A, B @ turn))
    for one, two in zip(inspect(state), inspect(same), strict=True):
        assert two.norm == pytest.approx(one.norm, rel=1e-5)
        assert two.effective_rank == pytest.approx(one.effective_rank, rel=1e-4)
    assert [p.cosine for p in diff(state, same)] == pytest.approx([1.0] * len(inspect(state)))
    here, there = diff(state, other), diff(same, other)
    assert [p.cosine for p in there] == pytest.approx([p.cosine for p in here], abs=1e-5)


def test_directions_that_have_nothing_in_common_are_at_right_angles():
    state, _ = states_of(model_with("llama", *[LoRA(rank=1, targets="q_proj")] * 2))
    e = torch.eye(32)
    one = changed(state, lambda A, B: (e[:1], e[:, :1]))
    other = changed(state, lambda A, B: (e[1:2], e[:, :1]))
    assert [pair.cosine for pair in diff(one, other)] == [0.0, 0.0]


def test_layers_of_one_alone_and_layers_of_nothing_have_no_cosine():
    one, other = states_of(
        model_with("llama", LoRA(rank=2, targets="q_proj"), LoRA(rank=2, targets="q_proj,v_proj"))
    )
    nothing = changed(one, lambda A, B: (A, torch.zeros_like(B)))
    pairs = {pair.path: pair for pair in diff(one, other)}
    assert len(pairs) == 4
    lone = pairs["model.layers.0.self_attn.v_proj"]
    assert lone.one is None
    assert lone.other is not None
    assert lone.cosine is None
    assert {pair.cosine for pair in diff(one, nothing)} == {None}
    assert total_cosine(diff(one, nothing)) is None
    assert [layer.effective_rank for layer in inspect(nothing)] == [0.0, 0.0]


def test_of_dora_the_product_is_measured():
    model = model_with("llama", LoRA(rank=2, targets="q_proj", dora=True))
    state = capture(model)
    assert is_dora(state)
    norms = [float(change.norm()) for change in whole(state).values()]
    assert [layer.norm for layer in inspect(state)] == pytest.approx(norms, rel=1e-5)


def test_what_has_no_factors_is_refused():
    model = tiny("llama")
    veneer.attach(model, veneer.Method("prompt"), seed=0)
    prompt = capture(model)
    (lora,) = states_of(model_with("llama", LoRA(rank=2)))
    with pytest.raises(veneer.AdapterError, match="prompt, and has no low-rank factors"):
        inspect(prompt)
    with pytest.raises(
        veneer.AdapterError, match="The second adapter cannot be measured: it was made by"
    ):
        diff(lora, prompt)
    (other,) = states_of(model_with("qwen3", LoRA(rank=2)))
    wider = changed(other, lambda A, B: (torch.ones(2, 7), B))
    with pytest.raises(veneer.AdapterError, match="different shapes"):
        diff(lora, wider)
