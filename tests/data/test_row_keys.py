"""Keys beside a row's own: read, named as unused, or refused where they change the meaning."""

import copy
import json
from functools import reduce

import pytest
from chat_templates import CHATML

from veneer.data.encode import UNLABELLED, Encoder
from veneer.data.problems import Located, Place
from veneer.data.rows import Conversation, Message, PlainText, parse_row, unused_keys
from veneer.errors import DataError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encoded(tokenizer, template, row):
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    example = Encoder(tokenizer, max_length=10_000).encode(Located(parse_row(row), Place("f", 1)))
    learnt = [label for label in example.labels if label != UNLABELLED]
    return tokenizer.decode(example.tokens), tokenizer.decode(learnt)


SHAPES = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "output": "a"},
    "question": {"question": "q", "answer": "a"},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_system_prompt_and_tools_beside_a_conversation_are_read(shape):
    row = parse_row({**shape, "system": "Be brief.", "tools": [TOOL]})
    assert [m.content for m in row.messages] == ["Be brief.", "q", "a"]
    assert row.messages[0].role == "system"
    assert row.tools == (TOOL,)
    assert parse_row({**shape, "system": " ", "tools": json.dumps([TOOL])}).tools == (TOOL,)
    assert row.unused == ()


def test_alpacas_history_comes_before_the_instruction_and_is_learnt():
    row = parse_row({**SHAPES["alpaca"], "system": "s", "history": [["p", "b"]]})
    assert [m.content for m in row.messages] == ["s", "p", "b", "q", "a"]
    assert [m.role for m in row.messages if m.learn] == [m.role for m in row.messages]


def test_a_system_prompt_may_be_there_twice_but_not_two_of_them():
    system = {"role": "system", "content": "s"}
    row = {"messages": [system, USER, ANSWER], "system": "s"}
    assert len(parse_row(row).messages) == 3
    with pytest.raises(ValueError, match="two system prompts"):
        parse_row({**row, "system": "t"})


def test_unused_keys_are_counted_in_rows():
    rows = [
        {"text": "t", "source": "book", "id": 0},
        {"messages": [{**USER, "mood": 1}, {**ANSWER, "mood": 2}], "id": 1, "note": None},
        {"prompt": [{**USER, "mood": 1}], "completion": [{**ANSWER, "mood": 2}], "text": "t"},
    ]
    counts = unused_keys(map(parse_row, rows))
    assert counts == {
        "id": 2,
        "source": 1,
        "messages[].mood": 1,
        "prompt[].mood": 1,
        "completion[].mood": 1,
        "text": 1,
    }


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    row = parse_row({"messages": [{**USER, "content": parts}, {**ANSWER, "content": parts}]})
    assert [m.content for m in row.messages] == ["one two"] * 2


@pytest.mark.parametrize(("weight", "learn"), [(0, False), (1, True), (0.0, False), (None, True)])
def test_a_weight_says_whether_a_message_is_learnt(weight, learn):
    row = parse_row({"messages": [USER, {**ANSWER, "weight": weight}, USER, ANSWER]})
    assert row.messages[1] == Message("assistant", "a", learn=learn)


CALLED = {"role": "assistant", "tool_calls": [CALL]}
BAD = {
    "system beside text": ({"text": "t", "system": "s"}, "'system' beside 'text' is not read"),
    "tools beside text": ({"text": "t", "tools": [TOOL]}, "'tools' beside 'text' is not read"),
    "context": ({**SHAPES["question"], "context": "c"}, "'context' beside 'question' and 'answer'"),
    "history": ({**SHAPES["messages"], "history": [["p", "b"]]}, "'history' beside 'messages'"),
    "images": ({**SHAPES["messages"], "images": ["x.png"]}, "'images' .* sees only text"),
    "functions": ({**SHAPES["messages"], "functions": [TOOL]}, "rename it to 'tools'"),
    "unwanted": ({**SHAPES["prompt"], "label": False}, "not wanted"),
    "broken history": ({**SHAPES["alpaca"], "history": [["p"]]}, "'history', round 1 must be"),
    "blank answer in history": (
        {**SHAPES["alpaca"], "history": [["p", ""]]},
        "round 1: the answer",
    ),
    "broken tools": ({**SHAPES["messages"], "tools": "[{"}, "'tools' is text, but not JSON"),
    "surrogate": (
        {**SHAPES["messages"], "tools": [{**TOOL, "x": "\ud800"}]},
        "'tools' .*surrogate",
    ),
    "NUL": ({"messages": [USER, {**ANSWER, "name": "\0"}]}, "'name' holds a NUL"),
    "deep": (
        {**SHAPES["messages"], "tools": [{**TOOL, "x": reduce(lambda x, _: [x], range(5000), [])}]},
        "nested too deeply",
    ),
    "nameless tool": ({**SHAPES["messages"], "tools": [{"x": 1}]}, "tool 1 has no 'name'"),
    "old call": (
        {"messages": [USER, {**ANSWER, "function_call": {"name": "f"}}]},
        "'function_call' .* give 'tool_calls'",
    ),
    "image part": (
        {"messages": [{**USER, "content": [{"type": "image_url"}]}, ANSWER]},
        "message 1: 'content', part 1 is of the type 'image_url'",
    ),
    "half a weight": ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "0 .* or 1 .*not 0.5"),
    "true weight": ({"messages": [USER, {**ANSWER, "weight": True}]}, "not True"),
    "user calls": ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, "only the assistant"),
    "nameless call": ({"messages": [USER, {**CALLED, "tool_calls": [{}]}]}, "call 1 has no 'name'"),
    "broken arguments": (
        {"messages": [USER, {**CALLED, "tool_calls": [{"name": "f", "arguments": "{"}]}]},
        "call 1: 'arguments' is text, but not JSON",
    ),
}


@pytest.mark.parametrize(("row", "says"), BAD.values(), ids=BAD.keys())
def test_what_would_change_the_meaning_is_refused(row, says):
    with pytest.raises(ValueError, match=says):
        parse_row(row)


def test_empty_keys_change_no_meaning():
    row = {**SHAPES["messages"], "images": [], "history": [], "tools": [], "functions": ""}
    assert parse_row(row) == Conversation((Message("user", "q"), Message("assistant", "a")))
    assert parse_row({"text": "t", "system": ""}) == PlainText("t")


@pytest.mark.parametrize("arguments", [{"city": "Bern"}, '{"city": "Bern"}'])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": "Let me see."}])
def test_a_tool_call_is_learnt_as_the_template_writes_it(tokenizers, arguments, content):
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    called = {"role": "assistant", "tool_calls": [call], **content}
    result = {"role": "tool", "content": "12 degrees", "name": "weather"}
    written = (content.get("content") or "") + (
        '<tool_call>weather {"city": "Bern"}</tool_call><|im_end|>'
    )
    thought = "<think>\n\n</think>\n\n"
    text, learnt = encoded(
        tokenizers["bytes"], TOOLS, {"messages": [USER, called], "tools": [TOOL]}
    )
    assert learnt == thought + written
    assert json.dumps(TOOL) in text
    # The call is no longer the last turn, so the template writes it without the thought.
    text, learnt = encoded(
        tokenizers["bytes"], TOOLS, {"messages": [USER, called, result, ANSWER], "tools": [TOOL]}
    )
    assert learnt == f"{written}{thought}a<|im_end|>"
    assert "12 degrees" in text


@pytest.mark.parametrize("template", [CHATML, None])
def test_tools_and_calls_that_the_template_does_not_write_are_refused(tokenizers, template):
    with pytest.raises(DataError, match="writes no tools"):
        encoded(tokenizers["bytes"], template, {**SHAPES["messages"], "tools": [TOOL]})
    with pytest.raises(DataError, match="does not write the call of 'weather' in message 2"):
        encoded(tokenizers["bytes"], template, {"messages": [USER, CALLED]})
