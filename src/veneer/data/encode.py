"""Rows to tokens and labels: what the model reads, and which of it the model is to learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise, takewhile
from typing import TYPE_CHECKING

import numpy as np

from veneer.data.chat import Chat, start_tokens
from veneer.data.pieces import pieces_of
from veneer.data.problems import Located, Place, Problem
from veneer.data.rows import LongRows, PlainText, Row
from veneer.data.spans import Span, tokens_in_spans
from veneer.errors import DataError, wrong_argument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNLABELLED = -100  # what torch.nn.functional.cross_entropy ignores

# Offsets weigh far more than tokens, so only those of this many rows are held at a time.
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Example:
    """One row as tokens. `labels[i]` is `tokens[i]` where that is learnt, else -100.

    The first token follows nothing, so it is never learnt. `truncated` counts the tokens of the
    row that no example holds because of the length, `unread` those of the turns behind the last
    answer.

    Of a pair, the tokens are the chosen answer's row and behind it, from `second` on, that of the
    rejected one; both begin with the prompt. desirable: of a row that was judged by itself.
    """

    tokens: list[int]
    labels: list[int]
    where: str
    truncated: int
    unread: int = 0
    second: int = 0
    desirable: bool = True

    @property
    def label_tokens(self) -> int:
        """How many tokens of the row are learnt."""
        return len(self.labels) - self.labels.count(UNLABELLED)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text, with the spans of it that are learnt. `whole`: it is not a conversation."""

    text: str
    spans: list[Span]
    place: Place
    whole: bool
    unread: str = ""


class Encoder:
    """Turns rows into examples of at most `max_length` tokens.

    Of a longer row, `long_rows` says what becomes: cut keeps its first tokens, split makes it
    several examples, drop leaves it out, error makes it a problem. None splits texts and cuts
    conversations. `dropped` has the tokens of each row left out, `split` counts the rows split.

    A conversation is written with the model's chat template, or with `PLAIN_TEMPLATE` where it
    has none (`uses_plain_template`); its answers are learnt, each with the token that ends it.
    A text is learnt whole, with the tokenizer's end token behind it.
    Raises DataError for a tokenizer that cannot say where its tokens are in the text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        long_rows: LongRows | None = None,
    ) -> None:
        assert max_length > 0
        if not hasattr(tokenizer, "is_fast"):
            raise wrong_argument(tokenizer, "A tokenizer")
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} does not say where its tokens are in a text; "
                "use a fast tokenizer (a model with a tokenizer.json)"
            )
        self._tokenizer = tokenizer
        self._chat = Chat(tokenizer)
        self._start = start_tokens(tokenizer)
        self._eos: int | None = tokenizer.eos_token_id
        self._continues = _continues(tokenizer)
        self.max_length = max_length
        self._long_rows = long_rows
        self.dropped: list[int] = []
        self.split = 0
        self.uses_plain_template = self._chat.plain

    def encode(self, row: Located[Row]) -> Example:
        """Return one row as an example, its first piece. Raises DataError, naming the row."""
        try:
            return self.tokenise([self.render(row)])[0][0]
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from error

    def render(self, row: Located[Row]) -> Rendered:
        """Return one row as text. Raises DataError where the template refuses it."""
        if isinstance(row.value, PlainText):
            text = row.value.text
            spans = [(row.value.learnt_from, len(text))]
            return Rendered(text, spans, row.place, whole=True)
        text, spans = self._chat.conversation(row.value)
        turns = takewhile(lambda m: m.role != "assistant" or not m.learn, row.value.messages[::-1])
        unread = "\n".join(turn.content for turn in reversed(list(turns)))
        return Rendered(text, spans, row.place, whole=False, unread=unread)

    def long_rows(self, row: Rendered) -> LongRows:
        """Return what becomes of this row if it is too long."""
        return self._long_rows or ("split" if row.whole else "cut")

    def tokenise(self, rendered: Sequence[Rendered]) -> list[list[Example]]:
        """Return the examples of each rendered row, tokenised in one call.

        A row is several only where it is split, and else has its first tokens.
        """
        segments = [self._segments(row) for row in rendered]
        encoded = self._tokenizer(
            [row.text[a:b] for row, cuts in zip(rendered, segments, strict=True) for a, b in cuts],
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        # Not as `offset_mapping`, which would be made of them once more.
        tokenised = ((tokens.ids, tokens.offsets) for tokens in encoded.encodings or ())
        return [
            self._examples(row, cuts, list(islice(tokenised, len(cuts))))
            for row, cuts in zip(rendered, segments, strict=True)
        ]

    def _segments(self, row: Rendered) -> list[Span]:
        """Return the spans of a row that are tokenised apart: each answer begins one.

        When the model answers, its prompt was tokenised without the answer, so it is here too:
        the white space in which they meet may be other tokens when it is read as one.
        """
        starts = [start for start, _ in row.spans if start > 0] if self._continues else []
        return list(pairwise([0, *starts, len(row.text)]))

    def _examples(
        self, row: Rendered, segments: list[Span], tokenised: list[tuple[list[int], list[Span]]]
    ) -> list[Example]:
        """Return a row as tokens and labels. This is where the mask of the loss is made."""
        tokens: list[int] = []
        offsets: list[Span] = []
        for (first, _), (ids, spans) in zip(segments, tokenised, strict=True):
            tokens += ids
            offsets += [(first + start, first + end) for start, end in spans]
        learnt = tokens_in_spans(offsets, row.spans)
        labels = np.where(learnt, tokens, UNLABELLED).tolist()
        start: list[int] = []
        if row.whole:
            start = self._start
            end = [] if self._eos is None or tokens[-1:] == [self._eos] else [self._eos]
            tokens, labels = [*tokens, *end], [*labels, *end]
            offsets += [(len(row.text), len(row.text))] * len(end)
        size = max(1, self.max_length - len(start))
        least = 1 if start else 2  # so that each piece has a token to learn
        if len(tokens) <= size or self.long_rows(row) != "split":
            spans = [(0, min(len(tokens), size))]
        else:
            turn_ends = [] if row.whole else [behind for _, behind in row.spans]
            spans = pieces_of(row.text, offsets, size=size, least=least, turn_ends=turn_ends)
            first, behind = spans[-1]
            if behind - first < least <= size:
                spans[-1] = (behind - least, behind)  # one token is in two pieces
        examples = [
            self._example(row, start, tokens[first:behind], labels[first:behind])
            for first, behind in spans
        ]
        # What has nothing to learn is no example, but of a row that has nothing the first is.
        examples = [example for example in examples if example.label_tokens] or examples[:1]
        held = sum(len(example.tokens) - len(start) for example in examples)
        unread = 0
        if row.unread:
            unread = len(self._tokenizer(row.unread, add_special_tokens=False)["input_ids"])
        truncated = max(0, len(tokens) - held)
        examples[0] = replace(examples[0], truncated=truncated, unread=unread)
        if len(examples) > 1:
            self.split += 1
            examples = [
                replace(example, where=f"{row.place}, piece {number}")
                for number, example in enumerate(examples, start=1)
            ]
        return examples

    def _example(
        self, row: Rendered, start: list[int], tokens: list[int], labels: list[int]
    ) -> Example:
        tokens = [*start, *tokens][: self.max_length]
        labels = [*[UNLABELLED] * len(start), *labels][: self.max_length]
        labels[:1] = [UNLABELLED] * len(labels[:1])
        return Example(tokens, labels, str(row.place), truncated=0)


def encode_rows(
    encoder: Encoder, rows: Iterable[Located[Row]]
) -> tuple[list[Example], list[Problem]]:
    """Return the rows as examples, and the problems of those that cannot be learnt from."""
    examples: list[Example] = []
    problems: list[Problem] = []
    for encoded in encoded_rows(encoder, rows):
        if isinstance(encoded, Problem):
            problems.append(encoded)
        else:
            examples += encoded.examples
    return examples, problems


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as its examples, and its place."""

    examples: list[Example]
    place: Place


def encoded_rows(encoder: Encoder, rows: Iterable[Located[Row]]) -> Iterator[EncodedRow | Problem]:
    """Yield each row as its examples, or why it cannot be learnt from; nothing of one left out."""
    waiting = iter(rows)
    while chunk := list(islice(waiting, _ROWS_AT_ONCE)):
        rendered: list[Rendered] = []
        for row in chunk:
            try:
                rendered.append(encoder.render(row))
            except DataError as error:
                yield Problem(row.place, str(error))
        for row_text, pieces in zip(rendered, encoder.tokenise(rendered), strict=True):
            why = why_unusable(encoder, row_text, pieces[0])
            if why is None:
                yield EncodedRow(pieces, row_text.place)
            elif why:
                yield Problem(row_text.place, why)


def why_unusable(encoder: Encoder, row: Rendered, example: Example) -> str | None:
    """Return why nothing is learnt from a row, "" where it is left out as too long, or None."""
    long_rows, total = encoder.long_rows(row), len(example.tokens) + example.truncated
    if example.truncated and long_rows == "drop":
        encoder.dropped.append(total)
        return ""
    if example.truncated and long_rows == "error":
        return f"{total} tokens, more than the {len(example.tokens)} of --max-length"
    return None if example.label_tokens else _why_no_label(example)


def _why_no_label(example: Example) -> str:
    if example.truncated:
        total = len(example.tokens) + example.truncated
        return (
            f"no token to learn: its first answer begins beyond the {len(example.tokens)} tokens "
            f"that are kept of {total}; raise --max-length, or give --long-rows split"
        )
    return "no token to learn: the row is a single token"


def _continues(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether texts tokenised apart join seamlessly (SentencePiece puts "▁" between)."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in "ab"]
    joined = tokenizer.decode([*ids[0], *ids[1]], clean_up_tokenization_spaces=False)
    return bool(joined == "ab")
