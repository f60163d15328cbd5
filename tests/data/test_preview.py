"""A preview is the example's text, in pieces that are learnt and pieces that are not."""

import copy

import pytest
from chat_templates import CHATML
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.data.encode import UNLABELLED, Encoder, Example
from veneer.data.preview import preview
from veneer.data.problems import Located, Place
from veneer.data.rows import Conversation, Message

TEXT = st.text(st.sampled_from("ab é日😀\n"), min_size=1, max_size=8).filter(str.strip)


@pytest.mark.parametrize("name", ["bytes", "metaspace"])
@settings(max_examples=25)
@given(question=TEXT, answer=TEXT, length=st.integers(1, 60))
def test_pieces_alternate_and_join_to_the_text(tokenizers, name, question, answer, length):
    tokenizer = copy.copy(tokenizers[name])
    tokenizer.chat_template = CHATML
    turns = (Message("user", question), Message("assistant", answer))
    row = Located(Conversation(turns), Place("f", 1))
    whole = tokenizer.decode(Encoder(tokenizer, max_length=10_000).encode(row).tokens)
    for limit in (length, 10_000):
        pieces = preview(Encoder(tokenizer, max_length=limit).encode(row), tokenizer)
        joined = "".join(text for text, _ in pieces)
        assert "\ufffd" not in joined
        assert whole.startswith(joined)
        assert [learnt for _, learnt in pieces] == [False, True, False][: len(pieces)]
    assert joined == whole
    assert pieces[1][0].strip() == f"{answer}<|im_end|>".strip()


@settings(max_examples=25)
@given(text=TEXT, data=st.data())
def test_wherever_labels_begin_no_character_is_broken(tokenizers, text, data):
    tokenizer = tokenizers["bytes"]
    tokens = tokenizer(text)["input_ids"]
    learnt = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    labels = [t if yes else UNLABELLED for t, yes in zip(tokens, learnt, strict=True)]
    pieces = preview(Example(tokens, labels, "f:1", 0), tokenizer)
    assert "".join(piece for piece, _ in pieces) == text
