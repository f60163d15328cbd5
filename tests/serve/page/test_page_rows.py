"""What the page shows of rows, and what it takes away: without a browser."""

import io
import json
import zipfile
from types import SimpleNamespace

import pytest

from support.random_adapters import tokenizer
from support.server import scripted
from veneer.serve.api.protocol import ChatRequest
from veneer.serve.page.about import with_invocation
from veneer.serve.page.download import PIECE, zip_of
from veneer.serve.page.rows import first_rows

TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}
# As many templates have it: arguments as an object, and neither ids nor types.
CALL = {"function": {"name": "tide", "arguments": {"place": "the cove"}}}
MESSAGES = [
    {"role": "user", "content": "How is the tide?"},
    {"role": "assistant", "tool_calls": [CALL, CALL], "weight": 0},
    {"role": "tool", "content": "low"},
    {"role": "tool", "content": "high"},
    {"role": "assistant", "content": "Low, then high.", "weight": 0},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
]
TEMPLATE = """{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{% for m in messages %}{{ m.role }}: {{ m.content }}
{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ m.tool_call_id }}
{% endfor %}"""


def shown(tmp_path, row, kind="answers"):
    served = scripted()
    served.tokenizer.chat_template = TEMPLATE
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    places = SimpleNamespace(file=lambda file: path)
    jobs = SimpleNamespace(places=places, file=lambda id, param: SimpleNamespace(kind=kind))
    return first_rows(jobs, served, "file-1")


def test_a_question_keeps_calls_results_and_tools(tmp_path):
    (asks,) = shown(tmp_path, {"messages": MESSAGES, "tools": [TOOL]})["asks"]
    assert asks["answer"] == 'I look.\ntide {"place": "the cove"}'
    asked = ChatRequest(model="tiny", messages=asks["messages"], tools=asks["tools"])
    turns = [message.turn for message in asked.messages]
    assert [call["function"] for call in turns[1].fields["tool_calls"]] == [CALL["function"]] * 2
    ids = [call["id"] for call in turns[1].fields["tool_calls"]]
    assert [turn.fields["tool_call_id"] for turn in turns[2:4]] == ids == ["call_0", "call_1"]
    assert [tool.function.name for tool in asked.tools] == ["tide"]


def test_a_pair_is_shown_with_the_answer_that_is_not_wanted(tmp_path):
    pair = {"prompt": "a b", "chosen": "c", "rejected": "d e"}
    answer = shown(tmp_path, pair, "pairs")
    (row,) = answer["rows"]
    learnt = [[text for text, is_learnt in row[key] if is_learnt] for key in ("pieces", "rejected")]
    assert [text.strip() for (text,) in learnt] == ["assistant: c</s>", "assistant: d e</s>"]
    assert (answer["kind"], answer["asks"][0]["answer"]) == ("pairs", "c")


def test_a_prompt_is_shown_with_the_fields_that_graders_can_read(tmp_path):
    asked = {"messages": [{"role": "user", "content": "a b"}], "sum": 7, "answer": "c"}
    asked |= {"two words": "c", "several": ["c"], "none": None}
    answer = shown(tmp_path, asked, "prompts")
    assert (answer["kind"], answer["fields"]) == ("prompts", ["answer", "sum"])
    assert answer["rows"][0]["learnt"] == 0
    assert not any(learnt for _, learnt in answer["rows"][0]["pieces"])
    assert answer["asks"] == [{"messages": asked["messages"], "tools": [], "answer": ""}]


def test_ids_of_calls_stay(tmp_path):
    messages = [dict(message) for message in MESSAGES]
    messages[1]["tool_calls"] = [{**CALL, "id": "one"}, {**CALL, "id": "two"}]
    messages[2]["tool_call_id"], messages[3]["tool_call_id"] = "two", "one"
    (asks,) = shown(tmp_path, {"messages": messages})["asks"]
    assert [call["id"] for call in asks["messages"][1]["tool_calls"]] == ["one", "two"]
    assert [each["tool_call_id"] for each in asks["messages"][2:4]] == ["two", "one"]
    assert asks["tools"] == []


def test_a_zip_file_comes_in_pieces_of_whatever_size_its_files_have(tmp_path):
    contents = {"config.json": b"{}", "deep/model.bin": bytes(range(256)) * (PIECE // 100)}
    for name, content in contents.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    pieces = list(zip_of(tmp_path / "model", "mine"))
    assert max(map(len, pieces)) < PIECE + 1000
    with zipfile.ZipFile(io.BytesIO(b"".join(pieces))) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(f"mine/{name}") for name in contents} == contents
    (tmp_path / "one.gguf").write_bytes(b"GGUF")
    with zipfile.ZipFile(io.BytesIO(b"".join(zip_of(tmp_path / "one.gguf", "a.gguf")))) as archive:
        assert archive.namelist() == ["a.gguf"]


@pytest.mark.parametrize("tokens", ["<a>", [1, "b"], [1, 10**9], [-1], {}])
def test_an_invocation_that_is_none_is_not_shown(tokens):
    assert with_invocation({"rank": 2, "invocation": tokens}, tokenizer()) == {"rank": 2}


def test_an_invocation_is_shown_as_text():
    ids = tokenizer()("go:", add_special_tokens=False)["input_ids"]
    assert with_invocation({"invocation": ids}, tokenizer()) == {"invocation": "go:"}
