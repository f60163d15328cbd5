"""PEFT's files: what is refused of them, .bin, new tokens, the model card, and our own files."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import veneer
from support import adapter_states
from support.closeness import assert_same_logits
from support.peft_cases import CASES, SEEN, adapter_tensors, base, logits, opened, theirs, written
from support.random_adapters import same, shake, tokenizer, with_new_tokens
from support.tiny_models import quantized
from veneer.adapter import patterns
from veneer.checksums import SUMS
from veneer.formats import native
from veneer.formats.adapters import read
from veneer.formats.capture import capture
from veneer.formats.contents import without_place
from veneer.formats.peft import directory as store


@pytest.fixture
def place(request, tmp_path: Path) -> tuple[str, Path]:
    """An adapter of the case that the test names, as PEFT writes it, and its base."""
    kind, options = CASES[request.param]
    written(theirs(kind, options), tmp_path / "peft")
    return kind, tmp_path / "peft"


def of(case: str) -> Any:
    return pytest.mark.parametrize("place", [case], indirect=True, ids=[case])


def refusal(place: tuple[str, Path], *, model: Any = None, **options: Any) -> str:
    model = base(place[0]) if model is None else model
    return adapter_states.refusal(model, place[1], **options)


def edit(place: tuple[str, Path], **changes: Any) -> None:
    adapter_states.edit_json(place[1] / store.CONFIG, **changes)


def rewrite(place: tuple[str, Path], change: Any) -> None:
    adapter_states.edit_tensors(place[1] / store.WEIGHTS, change)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
TOKENS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@of("lora_bias")
def test_a_lora_bias_that_is_missing_or_misshapen(place):
    rewrite(place, lambda t: t.update({f"{LAYER}.lora_B.bias": torch.zeros(3)}))
    assert "q_proj.lora_bias is (3,), but needs to be (32,)" in refusal(place)
    rewrite(place, lambda t: t.pop(f"{LAYER}.lora_B.bias"))
    assert "lora_bias is True, but model.layers.0.self_attn.q_proj has none" in refusal(place)
    edit(place, lora_bias=False)
    assert "lora_bias is False, but model.layers.1.self_attn.q_proj has one" in refusal(place)


@of("tokens")
def test_rows_of_tokens_that_do_not_fit(place):
    edit(place, trainable_token_indices=[4, 4, 120])
    message = refusal(place)
    assert "rows for tokens 120 of model.embed_tokens, but the base has 96; resize" in message
    assert "more than one row of model.embed_tokens" in message
    edit(place, trainable_token_indices=[4, 5])
    assert "rows of model.embed_tokens is (3, 32), but needs to be (2, 32)" in refusal(place)
    edit(place, trainable_token_indices={"wte": [4, 5, 6]})
    message = refusal(place)
    assert "names 'wte', of which there are no rows" in message
    assert "does not say whose rows model.embed_tokens has" in message
    edit(place, trainable_token_indices=None)
    assert "trainable_token_indices names tokens, and there are rows of 1" in refusal(place)
    edit(place, trainable_token_indices={"embed_tokens": "all"})
    assert "must be lists of numbers" in refusal(place)


@of("tokens of both, tied")
def test_rows_that_only_a_tied_base_has(place):
    edit(place, base_model_name_or_path=None)
    assert "rows of lm_head are missing" in refusal(place, model=base("qwen2"))


def test_rows_of_a_head_with_a_bias(tmp_path):
    """PEFT leaves the bias out where it trains rows of the head, which nobody means."""
    options = {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 4]}}
    written(theirs("phi", options), tmp_path)
    assert "lm_head has a bias, which PEFT leaves out" in refusal(("phi", tmp_path))


@of("saved head")
def test_saved_modules_that_do_not_fit(place):
    rewrite(
        place,
        lambda t: t.update({"base_model.model.lm_head.weight": torch.full((96, 3), torch.nan)}),
    )
    message = refusal(place)
    assert "lm_head.weight is (96, 3), but needs to be (96, 32)" in message
    assert "lm_head.weight has values that are not finite" in message
    rewrite(place, lambda t: t.pop("base_model.model.lm_head.weight"))
    assert "modules_to_save has 'lm_head', for which there are no weights" in refusal(place)
    rewrite(place, lambda t: t.update({"base_model.model.other.lm_head.x": torch.zeros(2)}))
    assert "it replaces other.lm_head.x, which the base does not have" in refusal(place)


@of("saved head")
def test_a_quantized_head_is_not_replaced(place):
    model = quantized("qwen2", head=True)
    assert "lm_head.weight, which this base has quantized" in refusal(
        place, model=model, force=True
    )


@of("saved head")
def test_over_a_quantized_base(place):
    """Biases and modules to save are not quantized, and replace the base's as over a dense base."""
    dense = veneer.load(base("qwen2"), place[1])
    model = quantized("qwen2", 8)
    own = logits(model, "qwen2")
    veneer.load(model, place[1], force=True)
    assert (logits(model, "qwen2") - logits(dense, "qwen2")).abs().max() < 0.1
    veneer.use(model, None)
    assert torch.equal(logits(model, "qwen2"), own)


@of("experts")
def test_parameters_that_do_not_fit(place):
    edit(place, target_parameters=["experts.down_proj"])
    assert "names 1 parameters of model.layers.0.mlp.experts, but there are tensors for 2" in (
        refusal(place)
    )
    edit(place, target_parameters=["experts.w1", "experts.w2"])
    assert "names w1 and w2 of model.layers.0.mlp.experts, and their" in refusal(place)
    edit(place, target_parameters=["experts.gate_up_proj", "experts.down_proj", "a.b"])
    assert "target_parameters names 'a.b', for which there are no tensors" in refusal(place)
    edit(place, target_parameters=["experts.gate_up_proj", "experts.down_proj"], r=2)
    assert "gate_up_proj has A (8, 2, 16) and B (8, 48, 2), but needs (4, 2, 16)" in refusal(place)


@pytest.mark.parametrize("changes", [{"groups": 8}, {"padding_mode": "circular"}], ids=str)
def test_convolutions_that_have_no_such_change(changes, tmp_path):
    def model():
        one = base("vit")
        conv = one.vit.embeddings.patch_embeddings.projection
        if "groups" in changes:
            conv = torch.nn.Conv2d(3, 18, 4, 4, groups=3)
        conv.padding_mode = changes.get("padding_mode", "zeros")
        one.vit.embeddings.patch_embeddings.projection = conv
        return one

    written(theirs("vit", CASES["Conv2d"][1]), tmp_path)
    why = "groups" if "groups" in changes else "pads by 'circular'"
    assert why in refusal(("vit", tmp_path), model=model(), force=True)
    with pytest.raises(veneer.ConfigError, match=why):
        veneer.attach(model(), veneer.LoRA(targets=["projection"]))


def test_kinds_that_cannot_be_adapted(tmp_path):
    written(theirs("llama", {"target_modules": ["q_proj"]}), tmp_path)
    place = ("llama", tmp_path)
    rewrite(
        place,
        lambda t: t.update({k.replace("self_attn.q_proj", "mlp"): v + 0 for k, v in [*t.items()]}),
    )
    assert "model.layers.0.mlp is a LlamaMLP, which cannot be adapted" in refusal(place)


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "loftq", "lora_ga"])
@of("linear")
def test_adapters_of_a_changed_base(start, place):
    edit(place, init_lora_weights=start)
    assert "path_initial_model_for_weight_conversion" in refusal(place)


@of("bias lora_only")
def test_biases_that_no_setting_speaks_of(place):
    edit(place, bias="none")
    assert "self_attn.q_proj.base_layer.bias' is unknown" in refusal(place)


@pytest.mark.parametrize(
    "changes",
    [
        {"exclude_modules": 3},
        {"exclude_modules": "("},
        {"modules_to_save": "lm_head"},
        {"modules_to_save": ["("]},
        {"target_parameters": "experts"},
        {"layers_pattern": [1], "layers_to_transform": [0]},
        {"layers_pattern": "(", "layers_to_transform": [0]},
        {"layers_pattern": "layers", "layers_to_transform": ["("]},
        {"trainable_token_indices": [True]},
    ],
    ids=str,
)
@of("linear")
def test_settings_of_the_wrong_kind(changes, place):
    edit(place, **changes)
    refusal(place)


# A pattern that would take years.
NEVER = r"([a-z._0-9]|[a-z._0-9][a-z._0-9])+!"


@pytest.mark.parametrize(
    "changes",
    [{"exclude_modules": NEVER}, {"modules_to_save": [NEVER]}],
    ids=str,
)
@of("linear")
def test_patterns_that_take_too_long(changes, place, monkeypatch):
    monkeypatch.setattr(patterns, "MATCHING_SECONDS", 0.05)
    edit(place, **changes)
    assert "takes too long to match" in refusal(place)


@of("linear")
def test_a_pickle_is_read_on_demand(place):
    kind, directory = place
    expected = logits(veneer.load(base(kind), directory), kind)
    torch.save(load_file(directory / store.WEIGHTS), directory / store.PICKLE)
    (directory / store.WEIGHTS).unlink()
    message = refusal(place)
    assert "adapter_model.bin is a pickle" in message
    assert "--allow-bin" in message
    model = veneer.load(base(kind), directory, allow_bin=True)
    assert torch.equal(logits(model, kind), expected)
    torch.save({"x": Path("p")}, directory / store.PICKLE)
    assert "more than tensors" in refusal(place, allow_bin=True)


# Out again.


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # tied, and not
def test_new_tokens_in_rows_that_the_base_has(kind, tmp_path):
    model = base(kind)
    with_new_tokens(model, tokenizer(90))
    shake(veneer.attach(model, veneer.LoRA(rank=2)))
    veneer.save(model, tmp_path, format="peft")
    asked = json.loads((tmp_path / store.CONFIG).read_text())["trainable_token_indices"]
    paths = ["model.embed_tokens"] + ["lm_head"] * (kind == "qwen2")
    assert asked == {path: [90, 91, 92] for path in paths}
    text = {"input_ids": torch.tensor([[1, 90, 5, 92, 91, 7]])}

    def of_text(model: Any) -> Tensor:
        with torch.no_grad():
            return model(**text).logits

    for other in (opened(kind, tmp_path), veneer.load(base(kind), tmp_path)):
        assert_same_logits(of_text(other), model, of_text)


def test_new_tokens_beyond_the_base(tmp_path):
    model = base("llama")
    with_new_tokens(model, tokenizer())
    veneer.attach(model, veneer.LoRA(rank=2))
    with pytest.raises(veneer.AdapterError, match=r"new tokens.*merge it, or write it natively"):
        veneer.save(model, tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()


def test_an_adapter_with_a_start_and_all_else(tmp_path):
    """What has no start comes to the same rank, and everything else goes along."""
    model = base("vit")
    config = veneer.LoRA(rank=2, targets=["projection", "q_proj"], init="pissa")
    shake(veneer.attach(model, config, seed=0))
    veneer.save(model, tmp_path, format="peft")
    own = partial(logits, kind="vit")
    assert_same_logits(own(opened("vit", tmp_path)), model, own)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("vit", ["projection", "v_proj"]),
        ("mixtral", ["gate_up_proj", "down_proj", "q_proj"]),
        ("gpt_oss", ["experts.down_proj"]),
        ("mixtral", ["gate.weight"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dora", [False, True])
def test_what_we_attach_peft_reads(kind, targets, dora, tmp_path):
    model = base(kind)
    own = logits(model, kind)
    config = veneer.LoRA(rank=3, alpha=5, targets=targets, dora=dora)
    if dora and kind != "vit":
        with pytest.raises(veneer.ConfigError, match="DoRA cannot be over"):
            veneer.attach(model, config)
        return
    veneer.attach(model, config, seed=0)
    assert torch.equal(logits(model, kind), own)
    shake(model)
    veneer.save(model, tmp_path, format="peft")
    assert_same_logits(logits(opened(kind, tmp_path), kind), model, partial(logits, kind=kind))


def test_a_model_card(tmp_path):
    model = base("llama")
    model.config._name_or_path = "somebody/some-model"
    shake(veneer.attach(model, veneer.LoRA(rank=4, alpha=8)))
    training = {"data": "0123456789abcdef", "recipe": {"rank": 4, "lr": 2e-4, "targets": ["q: x"]}}
    veneer.save(model, tmp_path / "native", training=training)
    again = base("llama")
    again.config._name_or_path = "somebody/some-model"
    veneer.load(again, tmp_path / "native")
    assert capture(again).training == {"base": {"dtype": "float32"}, **training}
    veneer.save(again, tmp_path / "peft", format="peft")
    card = (tmp_path / "peft" / store.CARD).read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": "somebody/some-model",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["veneer", "lora", "base_model:adapter:somebody/some-model"],
    }
    assert "LoRA of rank 4 and alpha 8 over 8 layers of somebody/some-model" in text
    assert training["data"] in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == training["recipe"]


def test_a_card_where_nothing_is_known(tmp_path):
    model = shake(veneer.attach(base("vit"), veneer.LoRA(rank=2, targets=["q_proj"])))
    veneer.save(model, tmp_path, format="peft")
    _, head, text = (tmp_path / store.CARD).read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "peft", "tags": ["veneer", "lora"]}
    assert "Recipe" not in text
    assert json.loads((tmp_path / store.CONFIG).read_text())["task_type"] is None


# Our own format.


@of("all at once")
def test_our_own_files(place, tmp_path):
    kind, directory = place
    model = veneer.load(base(kind), directory)
    veneer.save(model, tmp_path / "own")
    weights = torch.load(tmp_path / "own" / "lora_weights.pt", weights_only=True)
    beside = torch.load(tmp_path / "own" / native.SAVED, weights_only=True)
    assert {key.rpartition(".")[2] for key in weights} == {"lora_A", "lora_B", "lora_bias"}
    assert {"model.norm.weight", "model.embed_tokens.token_rows"} < set(beside)
    config = json.loads((tmp_path / "own" / "lora_config.json").read_text())
    assert config["tokens"] == {"model.embed_tokens": SEEN[4:6]}
    assert same(adapter_tensors(veneer.load(base(kind), tmp_path / "own")), adapter_tensors(model))

    del beside["model.norm.weight"]
    torch.save(beside, tmp_path / "own" / native.SAVED)
    (tmp_path / "own" / SUMS).unlink()
    assert "does not hold what" in refusal((kind, tmp_path / "own"))
    (tmp_path / "own" / native.SAVED).unlink()
    assert "does not hold what" in refusal((kind, tmp_path / "own"))


@of("all at once")
def test_what_a_plain_format_must_refuse(place):
    assert without_place(read(place[1]), "gguf") == [
        "biases of its own (lora_bias)",
        "modules to save or biases that replace the base's",
        "rows of single tokens",
    ]
