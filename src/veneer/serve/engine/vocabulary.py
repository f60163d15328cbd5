"""The tokens that prompts and answers are made of: a base's, or these with an adapter's own."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from weakref import WeakValueDictionary

from transformers import PreTrainedTokenizerBase

from veneer.adapter.new_tokens import extend_tokenizer
from veneer.errors import AdapterError
from veneer.formats.state import NewTokenRows
from veneer.generate.runners.adapter_rows import size_of, virtual_count, vocab_of
from veneer.serve.engine.adapter_cache import Fit
from veneer.serve.engine.grammar import Grammars
from veneer.serve.engine.library import Entry, Mix


@dataclass(eq=False)
class Vocabulary:
    """A tokenizer, and how many logits a token has.

    virtual: how many virtual tokens stand before each text. Their ids come behind all others, so
    that no text and no answer has them. alike: another one of the same tokens, if there is one.
    """

    tokenizer: PreTrainedTokenizerBase
    size: int
    virtual: int = 0
    alike: Vocabulary | None = None

    @property
    def virtual_ids(self) -> tuple[int, ...]:
        return tuple(range(self.size, self.size + self.virtual))

    @cached_property
    def grammars(self) -> Grammars:
        """The compiled grammars of answers in these tokens."""
        return Grammars(self.tokenizer, self.size) if self.alike is None else self.alike.grammars

    @cached_property
    def longest(self) -> int:
        """The characters of the longest token: a text has at least its length / that tokens."""
        return max(map(len, self.tokenizer.get_vocab()))


class Vocabularies:
    """The vocabulary of each adapter over one base, for any thread."""

    def __init__(self, fit: Fit, tokenizer: PreTrainedTokenizerBase) -> None:
        self.fit = fit
        self.base = Vocabulary(tokenizer, vocab_of(fit.model))
        self._of_version: dict[int, Vocabulary] = {}
        # Adapters with the same new tokens share one, for a tokenizer may be large.
        self._of_tokens: WeakValueDictionary[tuple[str, ...], Vocabulary] = WeakValueDictionary()
        self._lock = Lock()

    def of(self, mix: Mix) -> Vocabulary:
        """Return the vocabulary of adapters: that of the one that has tokens of its own.

        The base's for one that cannot be served; why, is said when it is loaded.
        """
        each = [self._of(entry) for entry, _ in mix]
        return next((own for own in each if own is not self.base), self.base)

    def drop_gone(self, versions: Collection[int]) -> None:
        """Drop those of versions other than these. Rows that use them keep them."""
        with self._lock:
            self._of_version = {v: own for v, own in self._of_version.items() if v in versions}

    def _of(self, entry: Entry) -> Vocabulary:
        with self._lock:
            vocabulary = self._of_version.get(entry.version)
        if vocabulary is None:
            vocabulary = self._read(entry)
            with self._lock:
                self._of_version[entry.version] = vocabulary
        return vocabulary

    def _read(self, entry: Entry) -> Vocabulary:
        try:
            state = self.fit.read(entry, shapes_only=True)
            self.fit.check(state, entry)
        except AdapterError:
            return self.base
        if (virtual := virtual_count(state)) > 0:
            return Vocabulary(self.base.tokenizer, self.base.size, virtual, self.base)
        if state.new_tokens is None:
            return self.base
        return self._extended(state.new_tokens, size_of(state, self.base.size))

    def _extended(self, new: NewTokenRows, size: int) -> Vocabulary:
        """Return the base's vocabulary with new tokens, whose ids follow the tokenizer's own."""
        with self._lock:
            vocabulary = self._of_tokens.get(new.tokens)
            if vocabulary is None:
                tokenizer = copy.deepcopy(self.base.tokenizer)
                extend_tokenizer(tokenizer, new.tokens)
                vocabulary = self._of_tokens[new.tokens] = Vocabulary(tokenizer, size)
        return vocabulary
