"""Pairs and judged answers, in the shapes that people keep them in."""

import json

import pytest

import veneer
from support.random_adapters import tokenizer
from veneer.data.encode import UNLABELLED, Example
from veneer.data.preview import preview

TOKENS = tokenizer()
ASKED = [{"role": "user", "content": "a b"}]


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def loaded(*rows: dict, shape: str = "pairs", **options: object) -> list[Example]:
    return veneer.load_examples(list(rows), TOKENS, shape=shape, **options)[0]


def both(example: Example) -> list[tuple[str, str]]:
    """Return the prompt and the answer of each row of an example, as texts."""
    texts = []
    for row in (slice(example.second), slice(example.second, None)):
        tokens, labels = example.tokens[row], example.labels[row]
        first = next(i for i, label in enumerate(labels) if label != UNLABELLED)
        assert labels[first:] == tokens[first:]
        texts.append((TOKENS.decode(tokens[:first]), TOKENS.decode(tokens[first:])))
    return texts


SHAPES = {
    "texts": {"prompt": "a b", "chosen": "c", "rejected": "d e"},
    "messages": {"prompt": ASKED, "chosen": [answer("c")], "rejected": [answer("d e")]},
    "implicit": {"chosen": [*ASKED, answer("c")], "rejected": [*ASKED, answer("d e")]},
    "repeated": {
        "prompt": "a b",
        "chosen": [*ASKED, answer("c")],
        "rejected": [*ASKED, answer("d e")],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_pair_is_the_same_pair(shape):
    (example,), (expected,) = loaded(SHAPES[shape]), loaded(SHAPES["texts"])
    assert (example.tokens, example.labels) == (expected.tokens, expected.labels)
    assert example.second == expected.second
    (prompt, chosen), (same, rejected) = both(example)
    assert prompt == same
    assert (chosen[0], rejected[0]) == ("c", "d")


def test_a_person_sees_both_rows_and_what_is_learnt_of_them():
    (example,) = loaded({"chosen": "a b: c d", "rejected": "a b: c e f"})
    pieces = preview(example, TOKENS)
    assert [text for text, learnt in pieces if learnt] == [" d</s>", " e f</s>"]
    assert (
        f"({example.second} tokens; beside it, with {len(example.tokens) - example.second}:)"
        in (pieces[2][0])
    )


def test_earlier_answers_that_both_share_are_not_learnt():
    before = [*ASKED, answer("c"), {"role": "user", "content": "f"}]
    (example,) = loaded({"chosen": [*before, answer("g")], "rejected": [*before, answer("h")]})
    (_, chosen), (_, rejected) = both(example)
    assert (chosen[0], rejected[0]) == ("g", "h")


def test_texts_without_a_prompt_begin_alike():
    (example,) = loaded({"chosen": "a b: c d", "rejected": "a b: c e f"})
    (prompt, chosen), (same, rejected) = both(example)
    assert prompt == same == "a b: c"
    assert (chosen, rejected) == (" d</s>", " e f</s>")


def test_a_judged_answer_has_the_next_ones_beside_it():
    rows = [
        {"prompt": "a b", "completion": "c", "label": True},
        {"prompt": "d", "completion": "e f", "label": False},
    ]
    first, second = loaded(*rows, shape="judged")
    assert (first.desirable, second.desirable) == (True, False)
    (asked, own), (same, others) = both(first)
    assert asked == same
    assert others == both(second)[0][1]
    assert own == both(second)[1][1]
    of_pair = loaded(SHAPES["texts"], shape="judged")
    assert [row.desirable for row in of_pair] == [True, False]


PROBLEMS = {
    "a pair needs 'chosen' and 'rejected', and the row has 'prompt', 'chosen'": (
        {"prompt": "a", "chosen": "b"}
    ),
    "did you mean 'rejected'": {"prompt": "a", "chosen": "b", "rejectd": "c"},
    "are the same, so there is nothing to prefer": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "must both be texts or both lists": {"chosen": "b", "rejected": [answer("c")]},
    "is only what both begin with": {"chosen": "a b ", "rejected": "a b c"},
    "'chosen' must end with an answer": {"chosen": ASKED, "rejected": [answer("c")]},
    "'rejected' is empty": {"prompt": "a", "chosen": "b", "rejected": " "},
    "learn from it by --objective kto": {"prompt": "a", "completion": "b", "label": True},
}


def test_every_problem_is_named_with_its_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS.values()))
    with pytest.raises(veneer.DataError) as caught:
        veneer.load_examples(path, TOKENS, shape="pairs")
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == len(PROBLEMS)
    for number, (what, line) in enumerate(zip(PROBLEMS, lines, strict=True), 1):
        assert f"{path}:{number}: " in line
        assert what in line


def test_answers_that_differ_only_beyond_the_length_are_a_problem():
    long = {"prompt": "a", "chosen": "b c d e f g", "rejected": "b c d e f h"}
    with pytest.raises(veneer.DataError, match="do not differ within --max-length"):
        loaded(long, max_length=6)


def test_a_pair_among_answers_says_what_learns_from_it():
    with pytest.raises(veneer.DataError, match=r"is a pair of answers; .* --objective dpo"):
        loaded(SHAPES["texts"], shape="answers")


@pytest.mark.parametrize("label", ["yes", None])
def test_a_judgement_must_be_true_or_false(label):
    with pytest.raises(veneer.DataError, match="'label' must be true or false"):
        loaded({"prompt": "a", "completion": "b", "label": label}, shape="judged")


def test_one_judged_answer_has_nothing_to_be_compared_with():
    with pytest.raises(veneer.DataError, match="give more rows"):
        loaded({"prompt": "a", "completion": "b", "label": True}, shape="judged")
