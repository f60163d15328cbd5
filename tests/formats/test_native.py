"""Law 5, for our own format: what is saved, loads, and nothing else does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from support.random_adapters import (
    NEW_TOKENS,
    ids,
    logits,
    same,
    shake,
    snapshot,
    targets_named,
    tokenizer,
    with_new_tokens,
)
from support.tiny_models import ARCHITECTURES, VOCAB, tiny
from veneer.adapter.new_tokens import new_tokens_of
from veneer.formats import native
from veneer.formats.adapters import read
from veneer.formats.capture import capture
from veneer.formats.state import AdapterState

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True, "alpha": 3, "targets": "all"},
    "patterns": {
        "targets": "all",
        "rank_pattern": {r"layers\.1\..*|h\.1\..*": 5},
        "alpha_pattern": {r".*\.0\..*": 2.5},
    },
    "dropout": {"dropout": 0.25},
    "layers": {"layers": "-1", "targets": "mlp"},
    "embedding": {"targets": "embedding"},
    "everything": {"targets": "everything", "dropout": 0.5},
}

CONFIG, WEIGHTS = "lora_config.json", "lora_weights.pt"


def adapted(architecture: str, case: str, *, seed: int = 1):
    model = tiny(architecture)
    options: dict[str, Any] = {"rank": 3, "targets": "attention"} | CASES[case]
    options["targets"] = targets_named(model, options["targets"])
    return shake(veneer.attach(model, veneer.LoRA(**options)), seed=seed)


def equal(a: AdapterState, b: AdapterState) -> bool:
    return (
        same(a.tensors, b.tensors)
        and (a.config, a.base_name, dict(a.base_fingerprint))
        == (b.config, b.base_name, dict(b.base_fingerprint))
        and (a.new_tokens is None) == (b.new_tokens is None)
        and (
            a.new_tokens is None
            or b.new_tokens is None
            or (
                (a.new_tokens.tokens, a.new_tokens.start)
                == (b.new_tokens.tokens, b.new_tokens.start)
                and torch.equal(a.new_tokens.embedding, b.new_tokens.embedding)
                and (a.new_tokens.head is None) == (b.new_tokens.head is None)
                and (a.new_tokens.head is None or torch.equal(a.new_tokens.head, b.new_tokens.head))
            )
        )
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip(architecture, case, tmp_path):
    model = adapted(architecture, case)
    veneer.save(model, tmp_path / "a")
    assert equal(read(tmp_path / "a"), capture(model))
    again = veneer.load(tiny(architecture), tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    assert not any(weight.requires_grad for weight in again.parameters())
    assert equal(capture(again), capture(model))
    veneer.save(again, tmp_path / "b")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        CONFIG,
        WEIGHTS,
    ]


def test_a_bf16_base_keeps_float32_adapters(tmp_path):
    model = tiny("llama", dtype=torch.bfloat16)
    shake(veneer.attach(model, veneer.LoRA(rank=2)))
    veneer.save(model, tmp_path / "a")
    assert {tensor.dtype for tensor in read(tmp_path / "a").tensors.values()} == {torch.float32}
    again = veneer.load(tiny("llama", dtype=torch.bfloat16), tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    # The fingerprint compares samples in bfloat16, so that the wider base is the same one.
    veneer.load(tiny("llama"), tmp_path / "a")


def test_several_adapters_over_one_base(tmp_path):
    model = tiny("qwen2")
    said = {}
    for seed, (name, targets) in enumerate({"a": "qv", "b": "mlp", "c": "all"}.items()):
        shake(veneer.attach(model, veneer.LoRA(rank=2, targets=targets), name=name), seed=seed)
    for name in "abc":
        veneer.use(model, name)
        said[name] = logits(model)
        veneer.save(model, tmp_path / name, name=name)
    assert all(not torch.equal(said["a"], said[name]) for name in "bc")
    again = tiny("qwen2")
    for name in "cab":
        veneer.load(again, tmp_path / name, name=name)
    for name in "abc":
        veneer.use(again, name)
        assert torch.equal(logits(again), said[name])
    veneer.use(model, {"a": 0.5, "b": -1.0, "c": 1.0})
    veneer.use(again, {"a": 0.5, "b": -1.0, "c": 1.0})
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_which_adapter_is_saved(tmp_path):
    model = tiny("llama")
    for name in ("a", "b"):
        veneer.attach(model, veneer.LoRA(rank=2), name=name)
    veneer.use(model, {"a": 1.0, "b": 1.0})
    with pytest.raises(veneer.AdapterError, match="2 adapters are in use"):
        veneer.save(model, tmp_path / "x")
    with pytest.raises(veneer.AdapterError, match="'aa'; did you mean 'a'"):
        veneer.save(model, tmp_path / "x", name="aa")
    veneer.use(model, None)
    with pytest.raises(veneer.AdapterError, match="0 adapters are in use"):
        veneer.save(model, tmp_path / "x")
    with pytest.raises(veneer.AdapterError, match="'onnx'"):
        veneer.save(model, tmp_path / "x", name="a", format="onnx")  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


# New words.

LONGER = ids(2, 10, vocabulary=VOCAB + len(NEW_TOKENS), seed=4)
LONGER[:, 1:4] = torch.arange(VOCAB, VOCAB + 3)


@pytest.mark.parametrize("size", [VOCAB, VOCAB - 5, VOCAB - 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_words_round_trip(architecture, size, tmp_path):
    model, tokens = tiny(architecture), tokenizer(size)
    words = with_new_tokens(model, tokens)
    assert words.tied == (tiny(architecture).config.tie_word_embeddings is True)
    shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all")))
    text = f"a {NEW_TOKENS[0]} over {NEW_TOKENS[2]}"
    encoded = torch.tensor([tokens(text)["input_ids"]])
    assert {size, size + 2} <= set(encoded[0].tolist())
    said = logits(model, encoded)
    assert said.shape[-1] == max(VOCAB, size + len(NEW_TOKENS))
    veneer.save(model, tmp_path / "a", tokenizer=tokens)

    fresh = tokenizer(size)
    again = veneer.load(tiny(architecture), tmp_path / "a", tokenizer=fresh)
    assert fresh.get_vocab() == tokens.get_vocab()
    assert fresh(text)["input_ids"] == encoded[0].tolist()
    assert torch.equal(logits(again, encoded), said)
    assert equal(capture(again, None, fresh), capture(model, None, tokens))

    plain = veneer.merge(again)
    assert new_tokens_of(plain) is None
    torch.testing.assert_close(logits(plain, encoded), said, rtol=1e-5, atol=1e-5)
    assert plain.get_input_embeddings().weight.shape[0] == said.shape[-1]
    assert plain.config.vocab_size == said.shape[-1]
    tied = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert tied == words.tied


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_new_words_from_the_disk(architecture, tmp_path):
    model, tokens = tiny(architecture), tokenizer()
    with_new_tokens(model, tokens)
    shake(veneer.attach(model, veneer.LoRA(rank=2)))
    veneer.write_model(veneer.merge(model), tokens, tmp_path / "plain")
    base = veneer.load_base(str(tmp_path / "plain"), dtype="float32")
    torch.testing.assert_close(
        logits(base.model, LONGER), logits(model, LONGER), rtol=1e-5, atol=1e-5
    )
    assert base.tokenizer(NEW_TOKENS[1])["input_ids"] == tokens(NEW_TOKENS[1])["input_ids"]


def saved_words(tmp_path: Path, architecture: str = "qwen2") -> Path:
    model, tokens = tiny(architecture), tokenizer()
    with_new_tokens(model, tokens)
    veneer.attach(model, veneer.LoRA(rank=2))
    veneer.save(model, tmp_path / "a", tokenizer=tokens)
    return tmp_path / "a"


def test_a_tokenizer_that_has_the_words_already(tmp_path):
    place, tokens = saved_words(tmp_path), tokenizer()
    tokens.add_tokens(list(NEW_TOKENS))
    before = tokens.get_vocab()
    veneer.load(tiny("qwen2"), place, tokenizer=tokens)
    assert tokens.get_vocab() == before


@pytest.mark.parametrize("others", [["other"], [*NEW_TOKENS[::-1]], [NEW_TOKENS[1]]])
def test_a_tokenizer_in_which_the_words_would_get_other_ids(others, tmp_path):
    place, tokens = saved_words(tmp_path), tokenizer()
    tokens.add_tokens(others)
    before, model = tokens.get_vocab(), tiny("qwen2")
    with pytest.raises(veneer.AdapterError, match="token"):
        veneer.load(model, place, tokenizer=tokens)
    assert tokens.get_vocab() == before
    assert new_tokens_of(model) is None


ROWS: dict[str, Any] = {
    "nan": lambda rows: rows["input_embeddings"].fill_(float("nan")),
    "narrow": lambda rows: rows.update(input_embeddings=torch.zeros(3, 5)),
    "too few": lambda rows: rows.update(input_embeddings=torch.zeros(2, 32)),
    "flat": lambda rows: rows.update(input_embeddings=torch.zeros(3)),
    "no head": lambda rows: rows.pop("output_embeddings"),
    "narrow head": lambda rows: rows.update(output_embeddings=torch.zeros(3, 5)),
    "short head": lambda rows: rows.update(output_embeddings=torch.zeros(2, 32)),
    "nan head": lambda rows: rows["output_embeddings"].fill_(float("inf")),
    "renamed": lambda rows: rows.update(embeddings=rows.pop("input_embeddings")),
}


@pytest.mark.parametrize("fault", ROWS)
def test_rows_of_new_words_that_do_not_fit(fault, tmp_path):
    place = saved_words(tmp_path)
    rows = torch.load(place / native.ROWS)
    ROWS[fault](rows)
    torch.save(rows, place / native.ROWS)
    refusal(place, architecture="qwen2")


@pytest.mark.parametrize(
    "changes",
    [
        {"new_words_start": 4000},
        {"new_words_start": -1},
        {"new_words_start": None},
        {"new_words": 3},
        {"new_words": [1, 2, 3]},
        {"new_words": []},
    ],
    ids=str,
)
def test_settings_of_new_words_that_do_not_fit(changes, tmp_path):
    place = saved_words(tmp_path)
    edit(place, changes)
    refusal(place, architecture="qwen2")


def test_new_words_come_once_and_before_adapters_of_the_embedding(tmp_path):
    place = saved_words(tmp_path)
    model = veneer.load(tiny("qwen2"), place)
    with pytest.raises(veneer.AdapterError, match="new tokens already"):
        veneer.load(model, place, name="b")
    with pytest.raises(veneer.VeneerError):
        veneer.add_tokens(model, tokenizer(), ["another"])
    for target in ("embed_tokens", "lm_head"):
        model, tokens = tiny("qwen2"), tokenizer()
        veneer.attach(model, veneer.LoRA(rank=2, targets=target))
        before = tokens.get_vocab()
        with pytest.raises(veneer.VeneerError, match="before"):
            veneer.add_tokens(model, tokens, NEW_TOKENS)
        assert tokens.get_vocab() == before
        with pytest.raises(veneer.AdapterError):
            veneer.load(model, place, name="b")


# Refusals.


@pytest.fixture
def place(tmp_path: Path) -> Path:
    veneer.save(adapted("llama", "everything"), tmp_path / "a", tokenizer=tokenizer())
    return tmp_path / "a"


def refusal(place: Path, architecture: str = "llama", **options: Any) -> str:
    """Return why the adapter is refused, having seen that the model stayed as it was."""
    model = tiny(architecture)
    before, structure = snapshot(model), repr(model)
    trains = [weight.requires_grad for weight in model.parameters()]
    with pytest.raises(veneer.AdapterError) as caught:
        veneer.load(model, place, **options)
    assert same(before, snapshot(model))
    assert repr(model) == structure
    assert trains == [weight.requires_grad for weight in model.parameters()]
    assert veneer.adapters(model) == {}
    return str(caught.value)


def edit(place: Path, changes: dict[str, Any]) -> None:
    config = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps(config | changes))


def rewrite(place: Path, change: Any) -> None:
    tensors = torch.load(place / WEIGHTS)
    change(tensors)
    torch.save(tensors, place / WEIGHTS)


@pytest.mark.parametrize("other", ["weights", "settings", "tokenizer"])
def test_a_foreign_base_of_the_same_shape(other, place):
    model, tokens = tiny("llama", seed=1 if other == "weights" else 0), tokenizer()
    if other == "settings":
        model.config.num_attention_heads = 2
    if other == "tokenizer":
        tokens = tokenizer(VOCAB - 1)
    before = snapshot(model)
    with pytest.raises(veneer.AdapterError, match=r"another base.*force"):
        veneer.load(model, place, tokenizer=tokens)
    assert same(before, snapshot(model))
    veneer.load(model, place, tokenizer=tokens, force=True)
    assert list(veneer.adapters(model)) == ["default"]


def test_force_does_not_excuse_what_does_not_fit(place):
    with pytest.raises(veneer.AdapterError, match="is no layer"):
        veneer.load(tiny("gpt2"), place, force=True)


def test_a_base_of_another_architecture(place):
    said = refusal(place, "gpt_neox")
    assert "another base" in said
    assert "model.layers.0.self_attn.q_proj is no layer" in said


Q, R = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"

FAULTS: dict[str, tuple[Any, str]] = {
    "renamed": (lambda t: t.update({f"{Q}.lora_C": t.pop(f"{Q}.lora_A")}), f"{Q}.lora_C"),
    "renamed layer": (
        lambda t: t.update({k.replace("q_proj", "qproj"): t.pop(k) for k in list(t) if Q in k}),
        "qproj is no layer of this model; did you mean",
    ),
    "half": (lambda t: t.pop(f"{Q}.lora_A"), f"{Q}.lora_B stands alone"),
    "missing": (lambda t: [t.pop(k) for k in list(t) if k.startswith(R)], f"missing for {R}"),
    "unexpected": (
        lambda t: t.update(
            {"lm_head.lora_A": torch.zeros(3, 32), "lm_head.lora_B": torch.zeros(96, 3)}
        ),
        "lm_head has weights, but is not among the targets",
    ),
    "stranger": (lambda t: t.update(extra=torch.zeros(1)), "extra stands alone"),
    "misshapen": (lambda t: t.update({f"{Q}.lora_A": torch.zeros(3, 31)}), "(3, 31)"),
    "flat": (lambda t: t.update({f"{Q}.lora_A": torch.zeros(())}), f"{Q} has A ()"),
    "transposed": (lambda t: t.update({f"{Q}.lora_B": t[f"{Q}.lora_B"].T}), "(3, 32)"),
    "nan": (lambda t: t[f"{R}.lora_B"].fill_(float("nan")), f"{R}.lora_B has values that are not"),
    "infinite": (lambda t: t[f"{R}.lora_A"][0, 0].fill_(-torch.inf), f"{R}.lora_A has values"),
    "other kind": (
        lambda t: t.update(
            {k.replace("lora_", "lora_embedding_"): t.pop(k) for k in list(t) if Q in k}
        ),
        f"{Q} is a Linear, of the other kind",
    ),
    "complex": (lambda t: t.update({f"{Q}.lora_A": t[f"{Q}.lora_A"] * 1j}), f"{Q}.lora_A"),
    "whole numbers": (lambda t: t.update({f"{Q}.lora_A": t[f"{Q}.lora_A"].long()}), f"{Q}.lora_A"),
    "sparse": (lambda t: t.update({f"{Q}.lora_A": t[f"{Q}.lora_A"].to_sparse()}), f"{Q}.lora_A"),
    "without values": (
        lambda t: t.update({f"{Q}.lora_A": t[f"{Q}.lora_A"].to("meta")}),
        f"{Q}.lora_A",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault, place):
    change, said = FAULTS[fault]
    rewrite(place, change)
    assert said in refusal(place)


def test_all_faults_are_named_at_once(place):
    together = ["half", "nan", "stranger"]
    for fault in together:
        rewrite(place, FAULTS[fault][0])
    model = tiny("llama", seed=1)
    with pytest.raises(veneer.AdapterError) as caught:
        veneer.load(model, place)
    said = str(caught.value)
    assert all(FAULTS[fault][1] in said for fault in together)
    assert "another base" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "format is 2"),
        ({"format": None}, "format is None"),
        ({"alhpa": 4}, "'alhpa' is unknown; did you mean 'alpha'"),
        ({"rank": 0, "dropout": 1}, "dropout is 1"),
        ({"rank": "3"}, "rank is '3'"),
        ({"rank": 4}, "needs (4, 32)"),
        ({"alpha": "much"}, "alpha is 'much'"),
        ({"dropout": "some"}, "dropout"),
        ({"init": ["kaiming"]}, "init is"),
        ({"rslora": "no"}, "rslora"),
        ({"targets": 5}, "int"),
        ({"targets": [5]}, "targets"),
        ({"targets": []}, "targets is empty"),
        ({"targets": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"layers": 1}, "layers is 1"),
        ({"layers": "9"}, "blocks 0 to 1"),
        ({"rank_pattern": 3}, "rank_pattern is 3"),
        ({"rank_pattern": {"q_proj": 3.5}}, "3.5"),
        ({"rank_pattern": {"(": 3}}, "no regular expression"),
        ({"alpha_pattern": {"nothing": 3}}, "'nothing' matches none"),
        ({"base": None}, "base"),
        ({"base": {"name": "x"}}, "base"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(changes, said, place):
    edit(place, changes)
    found = refusal(place)
    assert said in found
    assert str(place) in found or "does not fit the model" in found


@pytest.mark.parametrize("key", ["rank", "alpha", "targets", "base", "rslora", "new_words"])
def test_a_setting_that_is_missing(key, place):
    config = json.loads((place / CONFIG).read_text())
    del config[key]
    (place / CONFIG).write_text(json.dumps(config))
    assert f"{key!r} is missing" in refusal(place)


def test_places_without_an_adapter(tmp_path):
    assert "no adapter directory" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no adapter" in refusal(tmp_path / "empty")
