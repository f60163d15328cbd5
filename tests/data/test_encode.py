"""What is learnt is the answers, each with the token that ends it: no more and no less."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from chat_templates import (
    CHANNELS,
    CHATML,
    CLOSED,
    ENDLESS,
    GEMMA,
    LLAMA3,
    MISTRAL,
    OPEN_THOUGHT,
    PARTS,
    THINKING,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from veneer.data.chat import PLAIN_TEMPLATE, prompt_text
from veneer.data.columns import summarize
from veneer.data.encode import UNLABELLED, Encoder, Example, encode_rows
from veneer.data.problems import Located, Place
from veneer.data.rows import Conversation, Message, PlainText, Row
from veneer.errors import DataError

LONG = 100_000
HERE = Place("f", 1)


@dataclass(frozen=True)
class Style:
    """A template, and what is learnt of the answers (the last one may look different)."""

    template: str | None
    learnt: Callable[[str], str]
    last: Callable[[str], str] | None = None
    system: bool = True

    def expected(self, answers: list[str]) -> str:
        last = self.last or self.learnt
        return "".join([*map(self.learnt, answers[:-1]), last(answers[-1])])


STYLES = {
    "chatml": Style(CHATML, lambda a: f"{a}<|im_end|>"),
    "llama3": Style(LLAMA3, lambda a: f"{a.strip()}<|eot_id|>"),
    "mistral": Style(MISTRAL, lambda a: f" {a}</s>"),
    "gemma": Style(GEMMA, lambda a: f"{a.strip()}<end_of_turn>", system=False),
    "thinking": Style(
        THINKING,
        lambda a: f"{a}<|im_end|>",
        lambda a: f"<think>\n\n</think>\n\n{a}<|im_end|>",
    ),
    "open thought": Style(OPEN_THOUGHT, lambda a: f"{a}<|im_end|>"),
    "channels": Style(
        CHANNELS,
        lambda a: f"<|channel|>final\n{a}<|im_end|>",
        lambda a: f"<|channel|>final\n{a}<|eot_id|>",
    ),
    "closed": Style(CLOSED, lambda a: f"{a}<end_of_turn><|im_end|>"),
    "endless": Style(ENDLESS, lambda a: f"{a.rstrip()}</s>"),
    "plain": Style(None, lambda a: f"{a}</s>"),
}

# Of several bytes, of several code points, and white space of all kinds; none that spells a
# special token.
PIECES = [*"abINSTe :.#>é日😀👩\u200d\n\t", "  ", "\n\n", "👩‍👩‍👧", "🇫🇷", "the "]
CONTENT = st.lists(st.sampled_from(PIECES), max_size=10).map("".join)
ANSWER = CONTENT.filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn, *, system: bool = True) -> Conversation:
    turns = []
    if system and draw(st.booleans()):
        turns.append(Message("system", draw(CONTENT)))
    for _ in range(draw(st.integers(1, 3))):
        turns += [Message("user", draw(CONTENT)), Message("assistant", draw(ANSWER))]
    if draw(st.booleans()):
        turns.append(Message("user", draw(CONTENT)))
    return Conversation(tuple(turns))


def styled(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def answers_of(row: Conversation) -> list[str]:
    return [message.content for message in row.messages if message.role == "assistant"]


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def learnt_text(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    pairs = list(zip(example.tokens, example.labels, strict=True))
    assert all(label in (token, UNLABELLED) for token, label in pairs)
    return decoded(tokenizer, [token for token, label in pairs if label != UNLABELLED])


def conversation(*contents: str) -> Located[Row]:
    roles = ["user", "assistant"] * len(contents)
    return Located(Conversation(tuple(map(Message, roles, contents))), HERE)


@pytest.mark.parametrize("name", ["bytes", "bytes-trimmed"])
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES.keys())
@settings(max_examples=25)
@given(data=st.data())
def test_learnt_are_the_answers_and_their_ends(tokenizers, name, style, data):
    row = data.draw(conversations(system=style.system))
    tokenizer = styled(tokenizers[name], style.template)
    example = Encoder(tokenizer, max_length=LONG).encode(Located(row, HERE))
    assert learnt_text(tokenizer, example) == style.expected(answers_of(row))


@pytest.mark.slow  # its tokenizer takes seconds to be read; those above are byte-level too
@settings(max_examples=40)
@given(row=conversations())
def test_smollm2_learns_the_answers_and_their_ends(smollm2, row):
    example = Encoder(smollm2, max_length=LONG).encode(Located(row, HERE))
    expected = STYLES["chatml"].expected(answers_of(row))
    assert learnt_text(smollm2, example) == expected


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES.keys())
@settings(max_examples=15)
@given(data=st.data())
def test_spaces_apart_a_sentencepiece_tokenizer_gives_the_same(tokenizers, style, data):
    row = data.draw(conversations(system=style.system))
    tokenizer = styled(tokenizers["metaspace"], style.template)
    example = Encoder(tokenizer, max_length=LONG).encode(Located(row, HERE))
    learnt = learnt_text(tokenizer, example)
    assert "".join(learnt.split()) == "".join(style.expected(answers_of(row)).split())


@pytest.mark.parametrize("style", ["chatml", "llama3", "mistral", "gemma", "endless", "plain"])
@settings(max_examples=25)
@given(question=CONTENT, answer=ANSWER)
def test_an_example_begins_with_the_prompt_as_generation_sees_it(
    tokenizers, style, question, answer
):
    tokenizer = styled(tokenizers["bytes"], STYLES[style].template)
    prompt = prompt_text(tokenizer, [Message("user", question)])
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    example = Encoder(tokenizer, max_length=LONG).encode(conversation(question, answer))
    assert example.tokens[: len(tokens)] == tokens
    assert set(example.labels[: len(tokens)]) == {UNLABELLED}
    assert UNLABELLED not in example.labels[len(tokens) : len(tokens) + 2]


@settings(max_examples=25)
@given(row=conversations())
def test_the_tokens_are_those_of_the_templates_own_text(tokenizers, row):
    tokenizer = styled(tokenizers["bytes"], LLAMA3)
    answered = row.messages[: len(row.messages) - (row.messages[-1].role == "user")]
    turns = [{"role": message.role, "content": message.content} for message in answered]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    example = Encoder(tokenizer, max_length=LONG).encode(Located(row, HERE))
    assert decoded(tokenizer, example.tokens) == text


def test_turns_that_are_context_only_are_not_learnt(tokenizers):
    tokenizer = styled(tokenizers["bytes"], CHATML)
    user, old = Message("user", "q"), Message("assistant", "old", learn=False)
    row = Conversation((user, old, user, Message("assistant", "new")))
    example = Encoder(tokenizer, max_length=LONG).encode(Located(row, HERE))
    assert learnt_text(tokenizer, example) == "new<|im_end|>"
    assert "old" in decoded(tokenizer, example.tokens)


@pytest.mark.parametrize("style", ["chatml", "llama3", "mistral", "gemma", "thinking"])
def test_a_conversation_may_begin_with_the_assistant(tokenizers, style):
    tokenizer = styled(tokenizers["bytes"], STYLES[style].template)
    turns = (Message("assistant", "a"), Message("user", "q"), Message("assistant", "b"))
    example = Encoder(tokenizer, max_length=LONG).encode(Located(Conversation(turns), HERE))
    assert learnt_text(tokenizer, example).strip() == STYLES[style].expected(["a", "b"]).strip()


@pytest.mark.parametrize("name", ["bytes", "bytes-trimmed", "metaspace"])
@settings(max_examples=25)
@given(text=ANSWER)
def test_texts_are_learnt_whole_and_end_once(tokenizers, name, text):
    tokenizer = tokenizers[name]
    encoder = Encoder(tokenizer, max_length=LONG)
    for written in (text, f"{text}</s>"):
        example = encoder.encode(Located(PlainText(written), HERE))
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert example.tokens == [*plain, tokenizer.eos_token_id]
        assert example.labels == [UNLABELLED, *example.tokens[1:]]


def test_the_start_token_stands_where_the_tokenizer_has_it(tokenizers):
    from tokenizers import processors

    tokenizer = copy.deepcopy(tokenizers["bytes"])
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    encoder = Encoder(tokenizer, max_length=LONG)
    for row in (Located(PlainText("text"), HERE), conversation("text", "answer")):
        tokens = encoder.encode(row).tokens
        assert tokens[0] == bos
        assert bos not in tokens[1:]
    assert prompt_text(tokenizer, [Message("user", "q")]) == "<s>q\n"


def test_without_a_template_the_plain_one_is_used(tokenizers):
    tokenizer = tokenizers["bytes"]
    assert Encoder(tokenizer, max_length=9).uses_plain_template
    assert not Encoder(styled(tokenizer, CHATML), max_length=9).uses_plain_template
    example = Encoder(tokenizer, max_length=LONG).encode(conversation("q", "a", "r", "b"))
    assert decoded(tokenizer, example.tokens) == "q\na</s>\nr\nb</s>"
    with_it = styled(tokenizer, PLAIN_TEMPLATE)
    assert Encoder(with_it, max_length=LONG).encode(conversation("q", "a")) == Encoder(
        tokenizer, max_length=LONG
    ).encode(conversation("q", "a"))


@settings(max_examples=25)
@given(row=conversations(), length=st.integers(1, 80))
def test_truncation_keeps_the_first_tokens_and_counts_the_rest(tokenizers, row, length):
    tokenizer = styled(tokenizers["bytes"], CHATML)
    whole = Encoder(tokenizer, max_length=LONG).encode(Located(row, HERE))
    cut = Encoder(tokenizer, max_length=length).encode(Located(row, HERE))
    assert (cut.tokens, cut.labels) == (whole.tokens[:length], whole.labels[:length])
    assert cut.truncated == max(0, len(whole.tokens) - length)


@settings(max_examples=15)
@given(rows=st.lists(conversations() | ANSWER.map(PlainText), max_size=5))
def test_all_rows_at_once_are_each_row_alone(tokenizers, rows):
    encoder = Encoder(styled(tokenizers["bytes-trimmed"], LLAMA3), max_length=30)
    located = [Located(row, Place("f", n)) for n, row in enumerate(rows)]
    alone = [encoder.encode(row) for row in located]
    for row, example in zip(located, alone, strict=True):
        examples, problems = encode_rows(encoder, [row])
        assert examples[:1] == [example] * bool(example.label_tokens)
        assert [str(p.place) for p in problems] == [example.where] * (not example.label_tokens)
    each = [encode_rows(encoder, [row]) for row in located]
    examples, problems = encode_rows(encoder, located)
    assert examples == [example for one_row, _ in each for example in one_row]
    assert problems == [problem for _, one_row in each for problem in one_row]


def test_rows_that_the_template_refuses_are_all_named(tokenizers):
    encoder = Encoder(styled(tokenizers["bytes"], GEMMA), max_length=LONG)
    system = (Message("system", "s"), Message("user", "q"), Message("assistant", "a"))
    rows = [Located(Conversation(system[n % 2 :]), Place("f", n)) for n in range(4)]
    examples, problems = encode_rows(encoder, rows)
    assert [example.where for example in examples] == ["f:1", "f:3"]
    assert [problem.place for problem in problems] == [Place("f", 0), Place("f", 2)]
    assert all("System role not supported" in problem.what for problem in problems)


UPPER = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper if not loop.last }}")


@pytest.mark.parametrize("template", [THINKING, UPPER, PARTS])
def test_an_answer_that_the_template_rewrites_is_refused_not_mislabelled(tokenizers, template):
    encoder = Encoder(styled(tokenizers["bytes"], template), max_length=LONG)
    row = conversation("q", "<think>hm</think>a", "r", "b")
    with pytest.raises(DataError, match=r"f:1: .*rewrites the answer in message 2"):
        encoder.encode(row)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="Slow does not say where"):
        Encoder(Slow(), max_length=9)


def example(tokens: int, labels: int, truncated: int = 0) -> Example:
    ids = list(range(tokens))
    return Example(ids, [UNLABELLED] * (tokens - labels) + ids[tokens - labels :], "f:1", truncated)


def test_a_summary_counts_rows_and_tokens():
    examples = [example(5, 2), example(9, 0, truncated=3), example(4, 3, truncated=1)]
    summary = summarize(examples)
    assert (summary.rows, summary.tokens, summary.label_tokens) == (3, 18, 5)
    assert (summary.truncated, summary.longest) == (2, 9)
    assert summarize([]).longest == 0


def test_a_row_whose_answer_is_cut_off_is_named(tokenizers):
    encoder = Encoder(styled(tokenizers["bytes"], CHATML), max_length=4)
    examples, problems = encode_rows(encoder, [conversation("q" * 9, "a")])
    assert examples == []
    (problem,) = problems
    assert str(problem).startswith("f:1: no token to learn")
    assert "--max-length" in problem.what
