"""`veneer tune --invocation`, and what uses an adapter that acts from an invocation on."""

import json
import re

import pytest
import torch

import veneer
from support.random_adapters import tokenizer
from support.tuned_facts import FACTS, metrics, names
from veneer.cli.app import run
from veneer.data.encode import Example
from veneer.errors import DataError
from veneer.training import rows


def test_an_activated_adapter_from_end_to_end(tune, minigpt_home, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ("--invocation", "<|assistant|>", "--steps", 15, "--out", out)
    assert tune(*flags) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "The adapter acts from '<|assistant|>' (tokens" in printed
    assert "No merged model is written: default acts from an invocation on" in printed
    assert "lora_merged" not in names(out)
    losses = [line["loss"] for line in metrics(out)]
    assert losses[-1] < losses[0]
    adapter = out / "lora_adapter"
    base = veneer.load_base(minigpt_home)
    tokens = base.tokenizer("<|assistant|>", add_special_tokens=False)["input_ids"]
    assert json.loads((adapter / "lora_config.json").read_text())["invocation"] == tokens

    question = FACTS[0][0]
    assert run(["generate", str(minigpt_home), question, "--adapter", str(adapter)]) == 0
    output = capsys.readouterr().out.strip()
    plain = veneer.answer(base.model, base.tokenizer, question)
    before = base.tokenizer(question, return_tensors="pt")["input_ids"]
    own = base.model(before, use_cache=False).logits
    veneer.load(base.model, adapter, tokenizer=base.tokenizer)
    assert veneer.answer(base.model, base.tokenizer, question) == output != plain
    assert torch.equal(base.model(before, use_cache=False).logits, own)  # without its invocation

    assert run(["merge", str(minigpt_home), str(adapter), str(tmp_path / "merged")]) == 2
    assert "a merged weight would act on all tokens" in " ".join(capsys.readouterr().err.split())


def test_rows_without_the_invocation_are_named(tune, tmp_path, capsys):
    assert tune("--invocation", "zzz", "--steps", 1, "--out", tmp_path / "none") == 2
    refusal = " ".join(capsys.readouterr().err.split())
    assert f"None of {len(FACTS)} rows has the invocation 'zzz'" in refusal
    assert tune("--invocation", " dog", "--steps", 1, "--out", tmp_path / "some") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{len(FACTS) - 1} of {len(FACTS)} rows have no invocation" in printed
    assert re.search(r"2 of \d+ tokens that are learnt come before the invocation", printed)
    flags = ("--targets", "embed_tokens", "--steps", 1, "--out", tmp_path / "embedding")
    assert tune("--invocation", " dog", *flags) == 2
    refusal = " ".join(capsys.readouterr().err.split())
    assert "linear layers of the decoder's blocks alone" in refusal


def test_a_run_is_refused_only_where_no_row_at_all_has_the_invocation(monkeypatch):
    monkeypatch.setattr(rows, "MOST_LOOKED_THROUGH", 2)
    config = veneer.LoRA(invocation=(3, 4))
    examples = [Example(own, own, "row", 0) for own in ([1, 2], [3, 5], [4, 3], [1, 3, 4])]
    notices = rows._about_invocation(config, examples, tokenizer())
    assert notices[1].startswith("2 of the first 2 rows have no invocation")
    with pytest.raises(DataError, match="None of 3 rows has the invocation"):
        rows._about_invocation(config, examples[:3], tokenizer())
