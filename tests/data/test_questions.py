"""Questions with all their right answers, and every problem with its place."""

import json

import pytest

from veneer.data.questions import Question, read_questions
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
