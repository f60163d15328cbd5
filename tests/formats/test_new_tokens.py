"""Law 5, for new tokens: their rows and the tokenizer's entries are saved, loaded and merged."""

from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from support.adapter_states import edit_json, edit_tensors, refusal, same_state
from support.closeness import assert_same_logits
from support.random_adapters import NEW_TOKENS, ids, logits, shake, tokenizer, with_new_tokens
from support.tiny_models import VOCAB, tiny
from veneer.adapter.new_tokens import new_tokens_of
from veneer.formats import native
from veneer.formats.capture import capture

# Tied, not tied, and with a scaled embedding.
ARCHITECTURES = ("llama", "qwen2", "gemma")


@pytest.mark.parametrize("size", [VOCAB, VOCAB - 5, VOCAB - 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_tokens_round_trip(architecture, size, tmp_path):
    model, tokens = tiny(architecture), tokenizer(size)
    new_tokens = with_new_tokens(model, tokens)
    assert new_tokens.tied == (tiny(architecture).config.tie_word_embeddings is True)
    shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all")))
    text = f"a {NEW_TOKENS[0]} over {NEW_TOKENS[2]}"
    encoded = torch.tensor([tokens(text)["input_ids"]])
    assert {size, size + 2} <= set(encoded[0].tolist())
    expected = logits(model, encoded)
    assert expected.shape[-1] == max(VOCAB, size + len(NEW_TOKENS))
    veneer.save(model, tmp_path / "a", tokenizer=tokens)

    fresh = tokenizer(size)
    again = veneer.load(tiny(architecture), tmp_path / "a", tokenizer=fresh)
    assert fresh.get_vocab() == tokens.get_vocab()
    assert fresh(text)["input_ids"] == encoded[0].tolist()
    assert torch.equal(logits(again, encoded), expected)
    assert same_state(capture(again, None, fresh), capture(model, None, tokens))

    plain = veneer.merge(again)
    assert new_tokens_of(plain) is None
    assert_same_logits(logits(plain, encoded), model, lambda model: logits(model, encoded))
    assert plain.get_input_embeddings().weight.shape[0] == expected.shape[-1]
    assert plain.config.vocab_size == expected.shape[-1]
    tied = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert tied == new_tokens.tied


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_new_tokens_from_the_disk(architecture, tmp_path):
    model, tokens = tiny(architecture), tokenizer()
    with_new_tokens(model, tokens)
    shake(veneer.attach(model, veneer.LoRA(rank=2)))
    veneer.write_model(veneer.merge(model), tokens, tmp_path / "plain")
    base = veneer.load_base(str(tmp_path / "plain"), dtype="float32")
    longer = ids(2, 10, vocabulary=VOCAB + len(NEW_TOKENS), seed=4)
    longer[:, 1:4] = torch.arange(VOCAB, VOCAB + 3)
    assert_same_logits(logits(base.model, longer), model, lambda model: logits(model, longer))
    assert base.tokenizer(NEW_TOKENS[1])["input_ids"] == tokens(NEW_TOKENS[1])["input_ids"]


def saved_tokens(tmp_path: Path, architecture: str = "qwen2") -> Path:
    model, tokens = tiny(architecture), tokenizer()
    with_new_tokens(model, tokens)
    veneer.attach(model, veneer.LoRA(rank=2))
    veneer.save(model, tmp_path / "a", tokenizer=tokens)
    return tmp_path / "a"


def test_a_tokenizer_that_has_the_tokens_already(tmp_path):
    place, tokens = saved_tokens(tmp_path), tokenizer()
    tokens.add_tokens(list(NEW_TOKENS))
    before = tokens.get_vocab()
    veneer.load(tiny("qwen2"), place, tokenizer=tokens)
    assert tokens.get_vocab() == before


@pytest.mark.parametrize("others", [["other"], [*NEW_TOKENS[::-1]], [NEW_TOKENS[1]]])
def test_a_tokenizer_in_which_they_would_get_other_ids(others, tmp_path):
    place, tokens = saved_tokens(tmp_path), tokenizer()
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
def test_rows_of_new_tokens_that_do_not_fit(fault, tmp_path):
    place = saved_tokens(tmp_path)
    edit_tensors(place / native.ROWS, ROWS[fault])
    refusal(tiny("qwen2"), place)


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
def test_settings_of_new_tokens_that_do_not_fit(changes, tmp_path):
    place = saved_tokens(tmp_path)
    edit_json(place / native.config_name("lora"), **changes)
    refusal(tiny("qwen2"), place)


def test_new_tokens_come_once_and_before_adapters_of_the_embedding(tmp_path):
    place = saved_tokens(tmp_path)
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
