"""`veneer generate`, `chat` and `merge` with what a run has learnt."""

import io
from pathlib import Path

import pytest
import torch

import veneer
from support.tuned_facts import FACTS, MERGED_FILES, names, write_rows
from veneer.cli.app import run
from veneer.models.minigpt import load as load_minigpt


@pytest.fixture(scope="module")
def taught(minigpt_home, tmp_path_factory) -> Path:
    """The results of a run that was long enough to learn the facts."""
    home = tmp_path_factory.mktemp("taught")
    data = write_rows(home / "facts.jsonl", FACTS)
    flags = ("--steps", "120", "--lr", "0.01", "--targets", "all", "--quiet")
    flags = (*flags, "--tokens-per-step", "2048")
    arguments = [str(minigpt_home), str(data), "--out", str(home / "out")]
    assert run(["tune", *arguments, *flags]) == 0
    return home / "out"


def test_the_adapter_and_the_merged_model_answer_what_was_learnt(minigpt_home, taught):
    questions = [question for question, _ in FACTS]
    base = veneer.load_base(minigpt_home)
    before = veneer.answers(base.model, base.tokenizer, questions)
    veneer.load(base.model, taught / "lora_adapter", tokenizer=base.tokenizer)
    after = veneer.answers(base.model, base.tokenizer, questions)
    assert after == [answer for _, answer in FACTS]
    assert after != before
    merged = veneer.load_base(taught / "lora_merged")
    assert veneer.answers(merged.model, merged.tokenizer, questions) == after
    veneer.use(base.model, None)
    assert veneer.answers(base.model, base.tokenizer, questions) == before


def test_generate_prints_the_answer_and_nothing_else(minigpt_home, taught, capsys):
    question, answer = FACTS[0]
    adapter = ("--adapter", str(taught / "lora_adapter"))
    assert run(["generate", str(minigpt_home), question, *adapter]) == 0
    assert capsys.readouterr().out == f"{answer}\n"
    assert run(["generate", str(taught / "lora_merged"), question]) == 0
    assert capsys.readouterr().out == f"{answer}\n"
    assert run(["generate", str(minigpt_home), question]) == 0
    assert capsys.readouterr().out != f"{answer}\n"


def test_merge_writes_the_model_that_tune_wrote(minigpt_home, taught, tmp_path, capsys):
    out = tmp_path / "merged"
    assert run(["merge", str(minigpt_home), str(taught / "lora_adapter"), str(out)]) == 0
    assert names(out) == MERGED_FILES
    for name in MERGED_FILES - {"model.pt"}:
        assert (out / name).read_bytes() == (taught / "lora_merged" / name).read_bytes()
    model, theirs = load_minigpt(out)[0], load_minigpt(taught / "lora_merged")[0]
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), theirs.parameters(), strict=True)
    )
    # A directory that exists is replaced only if it holds a model.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    arguments = (str(minigpt_home), str(taught / "lora_adapter"), str(tmp_path / "mine"))
    assert run(["merge", *arguments]) == 2
    assert names(tmp_path / "mine") == {"letter.txt"}


def test_an_adapter_of_another_base_is_refused_unless_forced(taught, tmp_path, capsys):
    assert run(["pretrain", str(tmp_path / "other"), "--steps", "1", "--seed", "9"]) == 0
    arguments = ["generate", str(tmp_path / "other"), "Hello", "--max-new-tokens", "3"]
    arguments += ["--adapter", str(taught / "lora_adapter")]
    capsys.readouterr()
    assert run(arguments) == 2
    assert "another base" in capsys.readouterr().err
    assert run([*arguments, "--force"]) == 0


def test_chat_answers_until_an_empty_line(minigpt_home, taught, monkeypatch, capsys):
    (first, answer), (second, other) = FACTS[0], FACTS[1]
    adapter = ("--adapter", str(taught / "lora_adapter"))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{first}\n\n{second}\n"))
    assert run(["chat", str(minigpt_home), *adapter]) == 0
    printed = capsys.readouterr().out
    assert answer in printed
    assert other not in printed
    monkeypatch.setattr("sys.stdin", io.StringIO(first))  # the end of input ends it too
    assert run(["chat", str(minigpt_home), *adapter]) == 0
    assert answer in capsys.readouterr().out


def test_chat_keeps_the_conversation(minigpt_home, taught, monkeypatch, capsys):
    seen = []

    def stream(model, tokenizer, messages, *, sampling):
        seen.append([(message.role, message.content) for message in messages])
        yield from ("an ", "answer")

    monkeypatch.setattr(veneer, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert run(["chat", str(minigpt_home)]) == 0
    assert seen[1] == [("user", "one"), ("assistant", "an answer"), ("user", "two")]


def test_generation_ends_with_the_model_s_context(minigpt_home, capsys):
    assert run(["generate", str(minigpt_home), "Tell me", "--max-new-tokens", "600"]) == 0
    capsys.readouterr()
    assert run(["generate", str(minigpt_home), "A dog says woof. " * 200]) == 2
    assert "256" in capsys.readouterr().err
