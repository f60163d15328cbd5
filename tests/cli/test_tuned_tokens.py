"""`veneer tune` of virtual tokens and of new tokens, and what uses them."""

import json

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import veneer
from support.tuned_facts import ADAPTER_FILES, FACTS, MERGED_FILES, metrics, names, write_rows
from veneer.cli.app import run


@pytest.mark.parametrize(
    ("method", "shape", "flags"),
    [
        ("prefix", (4, 2, 4, 6, 16), ("--prefix-mlp", 32)),
        pytest.param(
            *("prefix", (4, 2, 4, 6, 16), ("--lr", 0.05)), marks=pytest.mark.slow
        ),  # as by an MLP, but for what makes it
        ("prompt", (6, 64), ("--prompt-text", "Say it the other way round.", "--lr", 0.05)),
    ],
    ids=["prefix by an MLP", "prefix", "prompt"],
)
def test_virtual_tokens_from_end_to_end(tune, minigpt_home, tmp_path, capsys, method, shape, flags):
    out = tmp_path / "out"
    flags = ("--method", method, "--virtual-tokens", 6, *flags, "--out", out)
    assert tune(*flags, "--steps", 15) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "No merged model is written: the virtual tokens of 'default' are no weights." in printed
    assert "6 virtual tokens" in printed
    kept = {
        f"{method}_adapter",
        "metrics.jsonl",
        "progress.json",
        "loss.png",
        "recipe.yaml",
        "checkpoints",
    }
    assert names(out) == kept
    adapter = out / f"{method}_adapter"
    files = {f"{method}_weights.pt", f"{method}_config.json", "tokenizer.json"}
    assert names(adapter) == {*files, "SHA256SUMS"}
    tensors = torch.load(adapter / f"{method}_weights.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {method: shape}
    losses = [line["loss"] for line in metrics(out)]
    assert losses[-1] < losses[0]

    question = FACTS[0][0]
    assert run(["generate", str(minigpt_home), question, "--adapter", str(adapter)]) == 0
    output = capsys.readouterr().out.strip()
    base = veneer.load_base(minigpt_home)
    plain = veneer.answer(base.model, base.tokenizer, question)
    veneer.load(base.model, adapter, tokenizer=base.tokenizer)
    assert veneer.answer(base.model, base.tokenizer, question) == output != plain
    veneer.use(base.model, None)
    assert veneer.answer(base.model, base.tokenizer, question) == plain

    assert tune(*flags, "--steps", 15, "--resume") == 0
    assert run(["merge", str(minigpt_home), str(adapter), str(tmp_path / "merged")]) == 2
    assert "are no weights" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_virtual_tokens_leave_that_much_less_of_the_context(tune, minigpt_home, tmp_path, capsys):
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"text": "A dog says woof. " * 200}) + "\n")
    flags = ("--method", "prompt", "--virtual-tokens")
    arguments = ("tune", str(minigpt_home), str(data), "--steps", "1", *flags)
    assert run([*arguments, "56", "--out", str(tmp_path / "out")]) == 0
    assert "longest row 200" in capsys.readouterr().out.replace("\n", " ")
    assert tune("--steps", 1, *flags, 255, "--out", tmp_path / "none") == 2
    assert "255 virtual tokens leave no room" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_new_words_become_tokens_with_rows_of_their_own(tune, minigpt_home, data, tmp_path):
    out = tmp_path / "out"
    write_rows(data, [*FACTS, ("Who are you?", "A veneer of plywood, since Sawday.")])
    asked = ("--new-words", "veneer, plywood,Sawday")
    assert tune("--out", out, *asked, "--steps", 10, "--lr", 0.02) == 0
    assert names(out / "lora_adapter") == ADAPTER_FILES | {"embedding_weights.pt"}
    assert names(out / "lora_merged") == MERGED_FILES
    rows = torch.load(out / "lora_adapter" / "embedding_weights.pt", weights_only=True)
    assert {name: tuple(row.shape) for name, row in rows.items()} == {"input_embeddings": (3, 64)}
    config = json.loads((out / "lora_adapter" / "lora_config.json").read_text())
    assert config["new_words"] == ["veneer", "plywood", "Sawday"]

    base = veneer.load_base(minigpt_home)
    size = len(base.tokenizer)
    merged = veneer.load_base(out / "lora_merged")
    assert len(merged.tokenizer) == merged.model.config.vocab_size == size + 3
    assert merged.tokenizer.encode("veneer") == [size]
    own = PreTrainedTokenizerFast(tokenizer_file=str(out / "lora_adapter" / "tokenizer.json"))
    assert own.encode("Sawday") == [size + 2]
    before, after = base.model.state_dict(), merged.model.state_dict()
    assert torch.equal(after["model.embed_tokens.weight"][:size], before["lm_head.weight"])

    veneer.load(base.model, out / "lora_adapter", tokenizer=base.tokenizer)
    questions = [question for question, _ in FACTS]
    adapted = veneer.answers(base.model, base.tokenizer, questions)
    assert veneer.answers(merged.model, merged.tokenizer, questions) == adapted


def test_auto_takes_the_words_that_are_split_into_many_tokens(minigpt_home, tmp_path):
    rows = [(f"What is a xylophyte, {n}?", "A qarrovin.") for n in "abc"]
    data = write_rows(tmp_path / "odd.jsonl", rows)
    out = tmp_path / "out"
    flags = ("--new-words", "auto", "--steps", "1", "--out", str(out))
    assert run(["tune", str(minigpt_home), str(data), *flags]) == 0
    config = json.loads((out / "lora_adapter" / "lora_config.json").read_text())
    assert set(config["new_words"]) == {"xylophyte", "qarrovin"}


def test_impossible_new_words_are_all_named_at_once(tune, tmp_path, capsys):
    assert tune("--new-words", "two words,<|end|>,one", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "'two words'" in error
    assert "'<|end|>'" in error
    assert not (tmp_path / "out").exists()
