"""Every shape that people keep rows in is read, and every problem in one is named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.data.rows import Conversation, Message, PlainText, parse_row

CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
ANY = st.text(CHARACTERS, max_size=20)
FULL = ANY.filter(str.strip)


def asked(question: str, answer: str, *, learn: bool = True) -> Conversation:
    return Conversation((Message("user", question, learn=learn), Message("assistant", answer)))


@given(question=ANY, answer=FULL)
def test_all_shapes_of_a_question_and_its_answer_mean_the_same(question, answer):
    shapes = [
        {"instruction": question, "output": answer},
        {"instruction": question, "input": "", "output": answer},
        {"instruction": question, "input": None, "output": answer, "text": "both at once"},
        {"question": question, "answer": answer, "id": 7},
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer},
            ]
        },
    ]
    assert {parse_row(shape) for shape in shapes} == {asked(question, answer)}


@given(question=ANY, answer=FULL)
def test_prompts_are_context_whether_text_or_messages(question, answer):
    as_messages = {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }
    as_text = {"prompt": question, "completion": answer}
    expected = asked(question, answer, learn=False)
    assert parse_row(as_messages) == parse_row(as_text) == expected


def test_answers_within_a_prompt_or_of_weight_0_are_not_learnt():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "old"}]
    new = {"role": "assistant", "content": "new"}
    in_prompt = parse_row({"prompt": [*turns, turns[0]], "completion": [new]})
    weighted = parse_row({"messages": [turns[0], {**turns[1], "weight": 0}, turns[0], new]})
    for row in (in_prompt, weighted):
        learnt = [m.content for m in row.messages if m.role == "assistant" and m.learn]
        assert learnt == ["new"]


@given(question=FULL, extra=FULL, answer=FULL)
def test_alpaca_input_follows_the_instruction_after_a_blank_line(question, extra, answer):
    row = {"instruction": question, "input": extra, "output": answer}
    assert parse_row(row) == asked(f"{question}\n\n{extra}", answer)


@given(text=FULL)
def test_text_is_text(text):
    assert parse_row({"text": text, "source": "book"}) == PlainText(text)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("developer", "system"), ("human", "user"), ("chatgpt", "assistant"), ("tool", "tool")],
)
def test_foreign_roles_are_translated(written, meant):
    answer = {"role": "assistant", "content": "yes"}
    row = parse_row({"messages": [{"role": written, "content": "x"}, answer]})
    assert row.messages[0].role == meant


def messages(*turns: object) -> dict[str, object]:
    return {"messages": list(turns)}


USER = {"role": "user", "content": "q"}

BAD_ROWS = {
    "not an object": ([1, 2], "must be an object, not a list"),
    "null": (None, "not null"),
    "no keys": ({}, "no keys"),
    "misspelt": ({"prompt": "a", "completon": "b"}, "'completon' is unknown.*'completion'"),
    "half a pair": ({"prompt": "a"}, "has 'prompt', but not 'completion'"),
    "no shape": ({"zebra": 1, "x": 2}, "has 'zebra', 'x'; it needs 'messages', or"),
    "wrong type": ({"text": 5}, "'text' must be a string, not a number"),
    "wrong type of prompt": ({"prompt": {}, "completion": "b"}, "'prompt' must be a string"),
    "empty text": ({"text": " \n"}, "'text' is empty"),
    "empty answer": ({"question": "a", "answer": "\t"}, "'answer' is empty"),
    "empty turn": (
        messages(USER, {"role": "assistant", "content": ""}),
        "message 2: 'content' is empty",
    ),
    "surrogate": ({"text": "ab\ud83d"}, r"lone surrogate U\+D83D.* position 3"),
    "NUL": ({"prompt": "a\0", "completion": "b"}, "'prompt' holds a NUL character at position 2"),
    "unknown role": (
        messages({"role": "Asistant", "content": "x"}),
        "message 1: the role 'Asistant' is unknown; did you mean 'assistant'",
    ),
    "no answer": (messages(USER, USER), "nothing to learn"),
    "no turns": (messages(), "nothing to learn"),
    "turns no list": ({"messages": "hello"}, "'messages' must be a list of messages"),
    "turn no object": (messages("hello"), "message 1 must be an object, not a string"),
    "no content": (messages({"role": "user", "contents": "x"}), "no 'content'; is 'contents' it"),
    "null content": (messages({"role": "user", "content": None}), "must be a string, not null"),
}


@pytest.mark.parametrize(("row", "says"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_each_problem_is_named(row, says):
    with pytest.raises(ValueError, match=says):
        parse_row(row)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "text", "prompt", "completion", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=40)  # each takes as long as a hundred of the others
@given(value=JSON)
def test_any_value_is_a_row_or_has_a_reason(value):
    try:
        row = parse_row(value)
    except ValueError as error:
        row = str(error)
    assert isinstance(row, Conversation | PlainText) or row
