"""What cannot be combined is refused, and notices on what can."""

from dataclasses import replace

import pytest
import torch

import veneer
from support.adapter_states import two_states
from support.random_adapters import tokenizer, with_new_tokens
from support.tiny_models import tiny
from veneer.adapter.config import LoRA
from veneer.algebra.combine import combine
from veneer.formats.adapters import read, write
from veneer.formats.capture import capture
from veneer.formats.install import install


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "sums"}, "'sums'"),
        ({"rank": 4}, "use svd"),
        ({"method": "svd"}, "needs a rank"),
        ({"method": "svd", "rank": 0}, "at least 1"),
        ({"method": "svd", "rank": 2, "density": 0.5}, "density would do nothing"),
        ({"method": "ties", "rank": 2}, "needs a density"),
        ({"method": "dare", "rank": 2, "density": 1.5}, "at most 1"),
        ({"method": "dare", "density": float("nan")}, "at most 1.*needs a rank"),
        ({"weights": (1.0,)}, "2 adapters, but 1 weights"),
        ({"weights": (1.0, 0.0)}, "weight 2 is 0.0"),
        ({"weights": (float("inf"), float("nan"))}, "weight 1 is inf.*weight 2 is nan"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, says):
    options = {"weights": (1.0, 1.0)} | settings
    with pytest.raises(veneer.ConfigError, match=says):
        combine(two_states(), **options)


def test_no_adapter_is_refused():
    with pytest.raises(veneer.ConfigError, match="no adapter"):
        combine([], [])


def test_what_cannot_be_summed_is_refused_all_at_once():
    plain, _ = two_states()
    model = tiny("llama")
    tokens = tokenizer()
    with_new_tokens(model, tokens)
    veneer.attach(model, LoRA(rank=2, targets="q_proj", dora=True), seed=0)
    dora = capture(model, tokenizer=tokens)
    prefix = tiny("llama")
    veneer.attach(prefix, veneer.Method("prefix"), seed=0)
    broken = replace(
        plain,
        base_fingerprint={"weights": "another"},
        tensors={k: x for k, x in plain.tensors.items() if not k.endswith("0.mlp.up_proj.lora_B")},
    )
    with pytest.raises(veneer.AdapterError) as refused:
        combine([plain, dora, capture(prefix), broken], [1.0] * 4)
    message = str(refused.value)
    assert "adapter 2: it is DoRA" in message
    assert "of full rank" in message
    assert "adapter 2: it has new tokens" in message
    assert "adapter 3: it was made by prefix" in message
    assert "adapter 4: model.layers.0.mlp.up_proj.lora_A stands alone" in message
    assert "adapter 4: it was made on another base than adapter 1 (its weights differ)" in message
    assert "adapter 1:" not in message


def test_tensors_of_other_kinds_and_numbers_that_are_none_are_refused():
    plain, _ = two_states()
    key = "model.layers.0.self_attn.q_proj"
    broken = replace(
        plain,
        tensors=plain.tensors
        | {f"{key}.lora_bias": torch.ones(32), f"{key}.lora_A": torch.full((2, 32), torch.nan)},
    )
    with pytest.raises(veneer.AdapterError) as refused:
        combine([broken], [1.0])
    assert "lora_bias is no tensor of a low-rank matrix" in str(refused.value)
    assert "q_proj.lora_A has values that are not finite" in str(refused.value)


def test_base_weights_that_come_along_are_kept_for_whoever_has_the_base():
    plain, _ = two_states(targets="embed_tokens")
    own = tiny("llama").get_input_embeddings().weight.detach()
    combined = combine([replace(plain, base_weights={"model.embed_tokens.weight": own})], [0.5])
    assert "embed_tokens.weight" in combined.notices[0]
    install(tiny("llama"), combined.state)
    other = combine([replace(plain, base_weights={"model.embed_tokens.weight": own + 1})], [0.5])
    with pytest.raises(veneer.AdapterError, match="differs from the base's"):
        install(tiny("llama"), other.state)


def test_layers_of_other_shapes_are_refused():
    one, _ = two_states()
    other = replace(
        one,
        base_fingerprint={},
        tensors={
            k: torch.ones(2, 5) if k.endswith("1.self_attn.q_proj.lora_A") else x
            for k, x in one.tensors.items()
        },
    )
    with pytest.raises(veneer.AdapterError, match=r"layers\.1\.self_attn\.q_proj is .32, 32. and"):
        combine([one, other], (1.0, 1.0))


def test_adapters_that_nothing_ties_to_one_base_are_reported(tmp_path):
    one, other = two_states()
    for name, state in (("one", one), ("other", other)):
        write(replace(state, base_name=name), tmp_path / name, format="peft")
    combined = combine([read(tmp_path / name) for name in ("one", "other")], (1.0, 1.0))
    assert any("one, other" in notice for notice in combined.notices)
    assert combine([one, other], (1.0, 1.0)).notices == ()
