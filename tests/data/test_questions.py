"""Questions with all their right answers, and every problem with its place."""

import io
import json
from pathlib import Path

import pytest

from veneer.data.questions import Question, read_prompts, read_questions
from veneer.data.rows import Message
from veneer.errors import DataError


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_that_ask_the_same_are_one_question(tmp_path):
    rows = [
        {"prompt": "a", "references": ["1", "2"]},
        {"prompt": "b", "completion": "3"},
        {"prompt": "a", "completion": "4"},
        {"question": "b", "answer": "3", "references": None},
    ]
    questions = read_questions(written(tmp_path / "q.jsonl", rows))
    asked = {question.turns[0].content: question.references for question in questions}
    assert asked == {"a": ("1", "2", "4"), "b": ("3",)}
    assert read_questions(tmp_path / "q.jsonl", limit=1) == questions[:1]


def test_the_last_answer_of_a_conversation_is_the_one_asked_for(tmp_path):
    turns = [("system", "be brief"), ("user", "a"), ("assistant", "1"), ("user", "b")]
    messages = [{"role": role, "content": text} for role, text in (*turns, ("assistant", "2"))]
    (question,) = read_questions(written(tmp_path / "q.jsonl", [{"messages": messages}]))
    assert question == Question(tuple(Message(role, text) for role, text in turns), ("2",))


def test_problems_are_named_all_at_once(tmp_path):
    rows = [
        {"text": "asks nothing"},
        {"prompt": "a", "references": []},
        {"prompt": "a", "references": ["fine", " "]},
        {"references": ["fine"]},
        {"prompt": "good", "completion": "good"},
        {"prompt": "a"},
        {"prompt": "a", "references": ["half \ud800"]},
    ]
    with pytest.raises(DataError) as caught:
        read_questions(written(tmp_path / "q.jsonl", rows))
    places = [problem.split(": ")[0].rsplit(":", 1)[1] for problem in caught.value.problems]
    assert places == ["1", "2", "3", "4", "6", "7"]


def test_a_prompt_is_any_row_with_or_without_its_answer(tmp_path):
    ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "1"}
    user = Message("user", "a")
    cases = [
        ({"prompt": "a", "completion": "1", "id": 7}, (user,), ("1",)),
        ({"prompt": "a", "completion": ""}, (user,), ()),
        ({"prompt": [ask]}, (user,), ()),
        ({"prompt": "a", "references": ["1", "2"]}, (user,), ("1", "2")),
        ({"messages": [ask]}, (user,), ()),
        ({"messages": [ask, answer]}, (user,), ("1",)),
        ({"messages": [ask, answer, ask], "system": "s"}, (Message("system", "s"), user), ()),
        ({"conversations": [{"from": "human", "value": "a"}]}, (user,), ()),
        ({"instruction": "a", "input": "b"}, (Message("user", "a\n\nb"),), ()),
        ({"question": "a", "answer": None}, (user,), ()),
        ({"text": "a"}, (user,), ()),
    ]
    prompts = read_prompts(written(tmp_path / "p.jsonl", [row for row, _, _ in cases]))
    for prompt, (row, turns, references) in zip(prompts, cases, strict=True):
        ends = (prompt.value.turns[0], prompt.value.turns[-1])
        assert ends == (turns[0], turns[-1]), row
        assert prompt.value.references == references, row
    assert [len(prompt.value.turns) for prompt in prompts] == [1] * 6 + [4] + [1] * 4
    assert prompts[0].value.unused == ("id",)
    (tmp_path / "p.txt").write_text("one\ntwo\n\nthree\n")
    asked = [(str(p.place), p.value.turns[0].content) for p in read_prompts(tmp_path / "p.txt")]
    assert asked == [(f"{tmp_path}/p.txt:1", "one\ntwo"), (f"{tmp_path}/p.txt:4", "three")]


def test_problems_of_prompts_are_named_all_at_once(tmp_path, monkeypatch):
    rows = [
        {"promt": "a"},
        {"prompt": "fine"},
        {"prompt": " "},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "1"}]},
        {"prompt": "a", "tools": [{"name": "f"}]},
        {"text": "a", "system": "s"},
        {"zebra": "a"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    with pytest.raises(DataError, match="7 of 8 prompts") as caught:
        read_prompts(Path("-"))
    assert [line.split(": ")[0] for line in caught.value.problems] == [
        f"stdin:{number}" for number in (1, 3, 4, 5, 6, 7, 8)
    ]
    assert "it needs 'messages', or 'conversations', or 'prompt', or" in caught.value.problems[-1]
