"""`veneer generate --prompts`: many prompts of a file, as lines of JSON."""

import json

import pytest

import veneer
from veneer.cli.app import run
from veneer.data.world import facts
from veneer.generate import many

QUESTIONS = [fact.questions[0] for fact in facts()[:60:7]]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def rows(tmp_path):
    rows = [{"prompt": question, "completion": "x"} for question in QUESTIONS]
    rows[2] = {"messages": [{"role": "system", "content": "é"}, {"role": "user", "content": "b"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_prompt_is_a_line_in_order(minigpt_home, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(many, "BATCHES_SORTED", 2)
    out = tmp_path / "out.jsonl"
    arguments = ["generate", str(minigpt_home), "--prompts", str(rows), "--max-new-tokens", "9"]
    assert run([*arguments, "--batch-size", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    # A line a minute says how far it is, and the last.
    first, *between, last = printed.err.splitlines()
    assert first == "  Answering 9 prompts, 2 at a time ..."
    assert between[-1] == "  9 of 9 prompts answered"
    assert last == f"9 answers in {out}"
    answered = lines(out)
    base, short = veneer.load_base(minigpt_home), veneer.Sampling(max_new_tokens=9)
    alone = veneer.answers(base.model, base.tokenizer, QUESTIONS, sampling=short, batch=1)
    assert [line["source"] for line in answered] == [f"{rows}:{i + 1}" for i in range(9)]
    assert answered[2]["prompt"][0] == {"role": "system", "content": "é"}
    for i in {*range(9)} - {2}:
        line = answered[i]
        assert (line["prompt"], line["reference"]) == (QUESTIONS[i], "x")
        assert line["completion"] == alone[i]
        tokens = base.tokenizer(line["completion"], add_special_tokens=False)["input_ids"]
        assert line["finish_reason"] == ("stop" if len(tokens) < 9 else "length")
    assert {line["finish_reason"] for line in answered} == {"stop", "length"}
    # What was answered is again a file of rows; the same goes to the screen, and no file is lost.
    assert len(veneer.load_examples(out, base.tokenizer)[0]) == 9
    assert run(arguments) == 0
    assert capsys.readouterr().out == out.read_text(encoding="utf-8")
    assert run([*arguments, "--out", str(out)]) == 2


def test_what_is_answered_is_there_after_an_interruption(minigpt_home, rows, tmp_path, monkeypatch):
    made = []

    def record(*arguments):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(many_record(*arguments))
        return made[-1]

    many_record = many.record
    monkeypatch.setattr(many, "record", record)
    out = tmp_path / "out.jsonl"
    arguments = ["generate", str(minigpt_home), "--prompts", str(rows), "--out", str(out)]
    assert run([*arguments, "--max-new-tokens", "3"]) == 130
    assert lines(out) == made


def test_mistakes_come_before_the_model_is_loaded(rows, tmp_path, refused, minigpt_home):
    for more in ([], ["Hello", "--prompts", str(rows)], ["Hello", "--out", "x"]):
        assert "--prompts" in refused("generate", "no/model", *more)
    assert "--batch-size" in refused("generate", "m", "--prompts", str(rows), "--batch-size", "0")
    bad = tmp_path / "bad.csv"
    bad.write_text("prompt\n \nfine\n")
    assert "bad.csv:2" in refused("generate", "no/model", "--prompts", str(bad))
    # How long a prompt is, only the model's tokenizer can say: nothing is answered before that.
    long = tmp_path / "long.txt"
    long.write_text("\n\n".join(["fine", "far too long " * 200, "fine", "far too long " * 300]))
    out = tmp_path / "out.jsonl"
    error = refused("generate", str(minigpt_home), "--prompts", str(long), "--out", str(out))
    assert "2 of 4 prompts" in error
    assert "long.txt:3: The prompt has" in error
    assert "long.txt:7: The prompt has" in error
    assert not out.exists()
