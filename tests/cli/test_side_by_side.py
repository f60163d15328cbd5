"""`veneer chat --compare`: the same question to several, what differs marked."""

import io

import pytest
from rich.console import Console

import veneer
from support.random_adapters import shake
from veneer.cli import side_by_side
from veneer.cli.app import run
from veneer.cli.side_by_side import DIFFERS, marked, table
from veneer.errors import ConfigError


def differing(texts):
    return [
        [text.plain[s.start : s.end] for s in text.spans if s.style == DIFFERS]
        for text in marked(texts)
    ]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["", ""], [[], []]),
        (["the same", "the same"], [[], []]),
        (["a red fox", "a blue fox"], [["red"], ["blue"]]),
        (["a fox", "a quick brown fox"], [[], ["quick", "brown"]]),
        (["a b c", "a x c", "a b y"], [["b", "c"], ["x"], ["y"]]),
        (["one", ""], [["one"], []]),
    ],
)
def test_words_that_differ_are_marked(texts, expected):
    assert differing(texts) == expected
    assert [text.plain for text in marked(texts)] == texts


def test_white_space_and_line_ends_stay_as_they_are():
    texts = ["  a\n\n b ", "a b"]
    assert [text.plain for text in marked(texts)] == texts


def test_answers_stand_in_columns():
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(table({"base": "a red fox", "[b]law": "a blue fox"}))
    shown = console.export_text().splitlines()
    assert "base" in shown[0]
    assert "[b]law" in shown[0]
    assert "a red fox" in shown[2]
    assert "a blue fox" in shown[2]


@pytest.mark.parametrize("compared", [["poem"], ["=x"], ["base=x"], ["a=x", "a=y"]])
def test_names_that_cannot_be_compared_are_all_refused(compared):
    with pytest.raises(ConfigError, match="cannot be followed"):
        side_by_side.named_directories(compared)


def test_a_talk_with_base_and_adapter(minigpt_home, tmp_path, monkeypatch, capsys):
    base = veneer.load_base(minigpt_home)
    veneer.attach(base.model, veneer.LoRA(rank=2, targets="all"))
    veneer.save(shake(base.model), tmp_path / "poem", tokenizer=base.tokenizer)
    asked = iter(["What is honey?", ""])
    monkeypatch.setattr(side_by_side.OUTPUT, "input", lambda prompt: next(asked))
    printed = []
    monkeypatch.setattr(side_by_side, "table", lambda text: printed.append(dict(text)) or "")
    arguments = ["--compare", f"poem={tmp_path / 'poem'}", "--max-new-tokens", "8"]
    assert run(["chat", str(minigpt_home), *arguments]) == 0
    sampling = veneer.Sampling(max_new_tokens=8)
    for name, which in (("base", None), ("poem", "default")):
        veneer.use(base.model, which)
        answer = veneer.answer(base.model, base.tokenizer, "What is honey?", sampling=sampling)
        assert printed[-1][name] == answer
    assert printed[-1]["base"] != printed[-1]["poem"]


def test_adapter_and_compare_exclude_each_other(capsys):
    assert run(["chat", "m", "--adapter", "a", "--compare", "b=c"]) == 2
    assert "exclude each other" in capsys.readouterr().err
