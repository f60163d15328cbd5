"""Answers that follow a grammar: which tokens may come next, by llguidance.

A grammar is compiled once for a tokenizer and copied for each row. No row knows of another's.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from veneer.errors import RequestError
from veneer.serve.engine.request import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPILED = 32  # grammars that are kept
# llguidance's own limits but for two. States take 1 to 2 kB each, so that a request's grammar takes
# at most 100 MB. The fuel bounds what a mask may take: with llguidance's own, an expression such as
# (a{1000}){1000} keeps every row waiting for seconds.
MOST_STATES = 50_000
FUEL = 250_000
# A space, or a new line with its indentation, as in any document that is laid out. Without such an
# end a model that began to write white space would go on with it.
WHITE_SPACE = r"\x20|\x0A[\x20\x09]{0,32}"
NO_TOKEN = "no token of this model can come next"
TRIED = 64  # sequences by which a tokenizer is tried


@dataclass(eq=False)
class Matcher:
    """Where a row's answer is in its grammar.

    vocab: logits of a token. end: what llguidance takes for the end of a text; which tokens end an
    answer is for the row to say.
    """

    matcher: LLMatcher
    vocab: int
    end: int
    asked_by: str

    @property
    def ended(self) -> bool:
        """Whether the answer is complete, and no token could follow."""
        return bool(self.matcher.is_stopped())

    def allowed(self, ends: Sequence[int]) -> Tensor:
        """Return which tokens may come next (vocab,), those of `ends` where the answer may end.

        Raises RequestError where none may.
        """
        mask = np.frombuffer(self.matcher.compute_logit_bias(), np.uint8) != 0
        self._check()
        mask[self.end] = False
        mask = mask[: self.vocab]
        mask[[end for end in ends if end < self.vocab]] = self.matcher.is_accepting()
        if not mask.any():
            raise _refused(self.asked_by, NO_TOKEN)
        return torch.from_numpy(mask)

    def forced(self) -> list[int]:
        """Return tokens of the text that must come next, up to the first that the model does not
        have; none where there is a choice."""
        tokens = self.matcher.compute_ff_tokens()
        return list(takewhile(lambda token: token < self.vocab, tokens))

    def accept(self, token: int) -> None:
        """Go on by a token. Raises RequestError where the grammar grows beyond its limits."""
        self.matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            raise _refused(self.asked_by, self.matcher.get_error())


class Grammars:
    """The compiled grammars of one tokenizer, for any thread; the thread that asks compiles.

    vocab: logits of a token, which may be more than the tokenizer has tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
        self.tokenizer, self.vocab = tokenizer, vocab
        self._of_tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._lock = Lock()

    def matcher(self, grammar: Grammar) -> Matcher:
        """Return a matcher at the beginning of a grammar. Raises RequestError for one that cannot
        be followed, with the reason."""
        key = (grammar.kind, grammar.text)
        with self._lock:
            compiled = self._compiled.get(key)
            own = self._of_tokenizer = self._of_tokenizer or _tokenizer_of(
                self.tokenizer, self.vocab, grammar.asked_by
            )
        if compiled is None:
            compiled = _compile(own, grammar)
        with self._lock:
            self._compiled[key] = compiled
            self._compiled.move_to_end(key)
            while len(self._compiled) > COMPILED:
                self._compiled.popitem(last=False)
            return Matcher(compiled.deep_copy(), self.vocab, own.eos_token, grammar.asked_by)


def _compile(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """Return a grammar's matcher. Raises RequestError."""
    from llguidance import LLMatcher, LLParserLimits, grammar_from

    text = grammar.text
    try:
        match grammar.kind:
            case "json_schema":
                defaults: Any = {"whitespace_pattern": WHITE_SPACE}
                source = LLMatcher.grammar_from_json_schema(text, defaults)
            case "regex":
                source = LLMatcher.grammar_from_regex(text)
            case "grammar":
                source = grammar_from("grammar", text)
    except (ValueError, RecursionError) as error:
        raise _refused(grammar.asked_by, str(error)) from error
    limits = LLParserLimits(
        max_lexer_states=MOST_STATES, initial_lexer_fuel=FUEL, verbose_errors=False
    )
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
    # The first mask is the dearest. It is computed here, where no other row waits, and copies have
    # its states. Some grammars show only behind a token that they are beyond the limits.
    tokens = np.frombuffer(matcher.compute_logit_bias(), np.uint8).nonzero()[0].tolist()
    trial = matcher.deep_copy()
    for token in [token for token in tokens if token != tokenizer.eos_token][:1]:
        trial.consume_token(token)
    for each in (matcher, trial):
        if each.is_error():
            raise _refused(grammar.asked_by, each.get_error())
    return matcher


def _refused(asked_by: str, why: str) -> RequestError:
    # llguidance ends the message with the grammar, and has a word alone for a dead end.
    lines = why.strip().splitlines() or [""]
    more = [line for line in lines[1:] if line.startswith("error:")][:1]
    first = NO_TOKEN if why.startswith("NoExtension") else " ".join([lines[0], *more])[:500]
    first = first.strip().rstrip(".")
    return RequestError(f"{asked_by} cannot be followed: {first}.", param=asked_by)


def _tokenizer_of(tokenizer: PreTrainedTokenizerBase, vocab: int, asked_by: str) -> LLTokenizer:
    """Return a tokenizer as llguidance takes it.

    Raises RequestError for one whose tokens have no text of their own.
    """
    from llguidance import LLTokenizer, TokenizerWrapper
    from llguidance.hf import from_tokenizer

    own: Any = tokenizer
    try:
        return from_tokenizer(own, vocab)
    except ValueError:  # of a decoder that llguidance does not know, or without an end token
        tokens = Tokens(tokenizer, vocab)
    if not tokens.add_up():
        raise RequestError(
            f"{asked_by} cannot be followed over this model: the texts of its tokens depend on "
            "those beside them.",
            param=asked_by,
        )
    return LLTokenizer(TokenizerWrapper(tokens), n_vocab=vocab + 1)


class Tokens:
    """The tokens of a tokenizer by what each decodes to, under the names that llguidance takes. The
    end token is one that the model does not have."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id, self.special_token_ids = vocab, None, [vocab]
        count = min(vocab, len(tokenizer))
        texts = [self._text([token]) for token in range(count)]
        self.tokens = [*(text.encode() for text in texts), *[b""] * (vocab + 1 - count)]

    def __call__(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def add_up(self) -> bool:
        """Try on random tokens whether the text of several is what each has by itself."""
        random = np.random.default_rng(0)
        for ids in random.integers(0, len(self.tokenizer), (TRIED, 8)).tolist():
            if self._text(ids).encode() != b"".join(self.tokens[token] for token in ids):
                return False
        return True

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def choice_of(texts: Sequence[str]) -> str:
    """Return the grammar, in Lark's form, of an answer that is one of `texts`."""
    return "start: " + " | ".join(json.dumps(text) for text in texts)
