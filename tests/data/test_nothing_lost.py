"""No text of a row is missing from what the model reads, unless the summary counts it as lost."""

import copy
import json

import pytest
from chat_templates import CHATML
from hypothesis import given, settings
from hypothesis import strategies as st
from test_row_keys import TOOLS

from veneer.data.columns import summarize
from veneer.data.encode import Encoder, encode_rows
from veneer.data.pieces import pieces_of
from veneer.data.problems import Located, Place
from veneer.data.rows import PlainText, parse_row

WORDS = st.sampled_from(["the ", "board. ", "naïve? ", "\n\n", "日😀", "layer ", "\n", "x"])
ASKED = st.lists(WORDS, max_size=12).map("".join)
SAID = ASKED.map(lambda text: f"a{text}z")
ROLES = {"from": {"user": "human", "assistant": "gpt"}, "role": {}}


@st.composite
def turns(draw, role_key="role", text_key="content"):
    """Messages of one format, and their texts."""
    messages, texts = [], []
    for role in ["user", "assistant"] * draw(st.integers(1, 3)):
        text = draw(SAID)
        content = text
        if role_key == "role" and draw(st.booleans()):
            content = [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]
        messages.append({role_key: ROLES[role_key].get(role, role), text_key: content})
        texts.append(text)
    if draw(st.booleans()):
        texts.append(draw(SAID))
        messages.append({role_key: ROLES[role_key].get("user", "user"), text_key: texts[-1]})
    elif role_key == "role" and draw(st.booleans()):
        arguments = {"city": draw(st.sampled_from(["Bern", "Biel"]))}
        call = {"function": {"name": "weather", "arguments": json.dumps(arguments)}}
        messages.append({"role": "assistant", "tool_calls": [call]})
        texts += ["weather", arguments["city"]]
    return messages, texts


@st.composite
def rows(draw):
    """A row of any format, and every text in it that the format defines."""
    shape = draw(st.sampled_from(["messages", "conversations", "pair", "alpaca", "qa", "text"]))
    if shape == "text":
        text = draw(SAID)
        return {"text": text}, [text]
    if shape == "messages":
        messages, texts = draw(turns())
        row = {"messages": messages}
    elif shape == "conversations":
        messages, texts = draw(turns("from", "value"))
        row = {"conversations": messages}
    else:
        question, answer = texts = [draw(SAID), draw(SAID)]
        keys = {
            "pair": ("prompt", "completion"),
            "alpaca": ("instruction", "output"),
            "qa": ("question", "answer"),
        }[shape]
        row = dict(zip(keys, (question, answer), strict=True))
        if shape == "alpaca":
            earlier = draw(st.lists(st.lists(SAID, min_size=2, max_size=2), max_size=2))
            row |= {"history": earlier, "input": draw(SAID)}
            texts = [*texts, row["input"], *(text for pair in earlier for text in pair)]
    if draw(st.booleans()):
        row["system"] = draw(SAID)
        texts = [*texts, row["system"]]
    if draw(st.booleans()):
        row["tools"] = [{"name": "zither", "description": draw(st.sampled_from(["plucks", "y"]))}]
        texts = [*texts, "zither", row["tools"][0]["description"]]
    return row, texts


@pytest.mark.parametrize("long_rows", [None, "cut", "split", "drop", "error"])
@settings(max_examples=60)
@given(row=rows(), max_length=st.sampled_from([2, 17, 60, 100_000]))
def test_no_text_of_a_row_is_missing_unless_it_is_counted(tokenizers, long_rows, row, max_length):
    value, texts = row
    tokenizer = copy.copy(tokenizers["bytes"])
    tokenizer.chat_template = TOOLS
    encoder = Encoder(tokenizer, max_length=max_length, long_rows=long_rows)
    examples, problems = encode_rows(encoder, [Located(parse_row(value), Place("f", 1))])
    assert all(len(example.tokens) <= max_length for example in examples)
    read = tokenizer.decode([token for example in examples for token in example.tokens])
    summary = summarize(examples, encoder.dropped)
    missing = [text for text in texts if text not in read]
    assert not missing or problems or summary.lost
    if "text" in value and long_rows in (None, "split") and max_length > 2:
        assert not missing
        assert not problems
    if max_length == 100_000 and not summary.unread:
        assert (problems, summary.lost, missing) == ([], 0, [])


@pytest.mark.parametrize("name", ["bytes", "bytes-trimmed", "metaspace"])
@settings(max_examples=40)
@given(text=SAID, max_length=st.integers(3, 40))
def test_a_texts_pieces_are_all_its_tokens_in_order(tokenizers, name, text, max_length):
    tokenizer = tokenizers[name]
    row = Located(PlainText(text), Place("f", 1))
    (whole,), _ = encode_rows(Encoder(tokenizer, max_length=100_000), [row])
    examples, problems = encode_rows(Encoder(tokenizer, max_length=max_length), [row])
    assert not problems
    tokens = [token for example in examples for token in example.tokens]
    if len(tokens) > len(whole.tokens):  # the last token alone would have nothing to learn from
        assert len(examples[-1].tokens) == 2
        del tokens[-2]
    assert tokens == whole.tokens
    assert summarize(examples).lost == 0
    assert len({example.where for example in examples}) == len(examples)


def cut_texts(text: str, size: int, turn_ends=()) -> list[str]:
    """Return the pieces of a text of which each character is a token."""
    offsets = [(n, n + 1) for n in range(len(text))]
    spans = pieces_of(text, offsets, size=size, least=2, turn_ends=turn_ends)
    return [text[first:behind] for first, behind in spans]


def test_pieces_end_with_turns_paragraphs_sentences_and_tokens_in_this_order():
    text = "One. Two.\n\nThree. Four five six"
    assert cut_texts(text, 14) == ["One. Two.\n\n", "Three. ", "Four five six"]
    assert cut_texts(text, 10)[0] == "One. Two.\n"
    assert cut_texts(text, 14, turn_ends=[3])[0] == "One"
    assert cut_texts(text, 6)[:2] == ["One. ", "Two.\n\n"]
    assert cut_texts("abcdefgh", 3) == ["abc", "def", "gh"]
    assert cut_texts("short", 9) == ["short"]


def test_no_piece_ends_within_a_character():
    offsets = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
    assert pieces_of("a😀b", offsets, size=4, least=1) == [(0, 4), (4, 5)]
    assert pieces_of("a😀b", offsets, size=3, least=1) == [(0, 1), (1, 4), (4, 5)]


@pytest.fixture
def chat(tokenizers):
    tokenizer = copy.copy(tokenizers["bytes"])
    tokenizer.chat_template = CHATML
    return tokenizer


LONG = {"prompt": "q", "completion": "a " * 50}


def test_rows_that_are_too_long_are_left_out_or_refused_on_request(chat):
    located = [
        Located(parse_row(row), Place("f", n))
        for n, row in enumerate([LONG, {"prompt": "q", "completion": "a"}], start=1)
    ]
    dropping = Encoder(chat, max_length=40, long_rows="drop")
    examples, problems = encode_rows(dropping, located)
    assert [example.where for example in examples] == ["f:2"]
    assert not problems
    total = len(Encoder(chat, max_length=1000).encode(located[0]).tokens)
    assert dropping.dropped == [total]
    summary = summarize(examples, dropping.dropped)
    assert (summary.dropped, summary.lost) == (1, total)
    assert summary.lost_share == total / (total + summary.tokens)
    _, problems = encode_rows(Encoder(chat, max_length=40, long_rows="error"), located)
    assert list(map(str, problems)) == [f"f:1: {total} tokens, more than the 40 of --max-length"]


def test_turns_behind_the_last_answer_count_as_lost(chat):
    turns = [{"role": role, "content": "word"} for role in ("user", "assistant", "user")]
    row = Located(parse_row({"messages": turns}), Place("f", 1))
    example = Encoder(chat, max_length=100).encode(row)
    assert example.unread == len(chat("word", add_special_tokens=False)["input_ids"])
    summary = summarize([example])
    assert (summary.truncated, summary.unread, summary.lost) == (0, 1, example.unread)
