"""Words that the base does not know: found, added to the tokenizer, and given rows that train.

Only the new rows are trained and saved. The base's own rows are never copied and never change.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.active import ActiveAdapters, active_adapters_of
from veneer.adapter.wrapper import Wrapper
from veneer.errors import ConfigError, ModelError
from veneer.quant.weight import QuantizedLinear


class NewTokenEmbedding(Wrapper):
    """Return the new row for ids from `start` on, and the original's row for every other id."""

    def __init__(
        self, original: nn.Module, rows: nn.Parameter, start: int, words: tuple[str, ...]
    ) -> None:
        super().__init__(original)
        self.rows = rows  # (new, dim), float32
        self.start = start
        self.words = words

    def forward(self, ids: Tensor) -> Tensor:
        known = self.original(ids.clamp(max=self.original.weight.shape[0] - 1))  # type: ignore[index]
        local = ids - self.start
        is_new = (local >= 0) & (local < len(self.rows))
        new = F.embedding(local.clamp(0, len(self.rows) - 1), self.rows)
        new = new.to(known.dtype) * getattr(self.original, "embed_scale", 1.0)
        return torch.where(is_new.unsqueeze(-1), new, known)


class NewTokenHead(Wrapper):
    """Return the original's logits with those of the new rows in the places from `start` on.

    While no adapter acts, the base speaks alone, and no new word is ever likely.
    """

    def __init__(
        self, original: nn.Module, rows: nn.Parameter, start: int, active_adapters: ActiveAdapters
    ) -> None:
        super().__init__(original)
        self.rows = rows  # (new, dim), float32
        self.start = start
        self.active_adapters = active_adapters

    def forward(self, x: Tensor) -> Tensor:
        logits = self.original(x)  # (..., words)
        new = F.linear(x, self.rows.to(x.dtype))  # (..., new)
        if self.active_adapters.idle:
            new = torch.full_like(new, -torch.inf)
        end = self.start + len(self.rows)
        return torch.cat([logits[..., : self.start], new, logits[..., end:]], dim=-1)


@dataclass(frozen=True)
class NewTokens:
    """The layers of a model that carry new rows."""

    embedding: NewTokenEmbedding
    head: NewTokenHead

    @property
    def tied(self) -> bool:
        return self.embedding.rows is self.head.rows

    def parameters(self) -> list[nn.Parameter]:
        return [self.embedding.rows] if self.tied else [self.embedding.rows, self.head.rows]


def find_new_tokens(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    pieces: int = 4,
    times: int = 3,
    most: int = 64,
) -> list[str]:
    """Return words of the texts that fall into many pieces, the most frequent first.

    A word counts if it occurs at least `times` times and its tokens number at least `pieces`.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"[^\W\d_]{4,}", text))
    frequent = [word for word, count in counts.most_common() if count >= times]
    return [word for word in frequent if len(_pieces(word, tokenizer)) >= pieces][:most]


def add_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> NewTokens:
    """Add words to the tokenizer, and a trained row for each to the model, in place.

    A new row starts as the mean of the rows of the pieces that the word fell into. Raises
    ConfigError for words that cannot be tokens, ModelError for a model without embeddings.
    """
    problems = []
    known = tokenizer.get_vocab()
    for word in words:
        if not word or any(character.isspace() for character in word):
            problems.append(f"{word!r} is empty or has a space in it")
        elif word in known or len(_pieces(word, tokenizer)) < 2:
            problems.append(f"{word!r} is a token already")
    if len(set(words)) < len(words):
        problems.append("some are named twice")
    if problems:
        raise ConfigError(f"These new words cannot be added: {'; '.join(problems)}.")
    pieces = [_pieces(word, tokenizer) for word in words]
    start = len(tokenizer)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or start > len(embedding.weight):  # type: ignore[arg-type]
        raise ModelError("New words need a model with an embedding and a head for every token.")
    if isinstance(embedding, Wrapper) or isinstance(head, Wrapper):
        raise ModelError("New words are added once, and before adapters of embedding and head.")
    rows = _mean_rows(embedding.weight, pieces)  # type: ignore[arg-type]
    head_rows = None if is_tied(embedding, head) else _mean_rows(head.weight, pieces)
    extend_tokenizer(tokenizer, words)
    return put_rows(model, words, rows, head_rows, start=start)


add_words = add_tokens  # the name that it had when a token was called a word


def is_tied(embedding: nn.Module, head: nn.Module) -> bool:
    """Say whether embedding and head are one weight; a packed head is not unpacked to know it."""
    return not isinstance(head, QuantizedLinear) and head.weight is embedding.weight


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> None:
    """Add words as tokens that stand for whole words alone, exactly as they are written."""
    tokens = [AddedToken(word, single_word=True, normalized=False) for word in words]
    tokenizer.add_tokens(tokens)


def put_rows(
    model: PreTrainedModel,
    words: Sequence[str],
    rows: Tensor,
    head_rows: Tensor | None,
    *,
    start: int,
) -> NewTokens:
    """Lay new rows (new, dim) over the model's embedding and head; one set for both when tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding is not None
    assert head is not None
    shared = nn.Parameter(rows.to(torch.float32))
    own = shared if head_rows is None else nn.Parameter(head_rows.to(torch.float32))
    laid = NewTokens(
        NewTokenEmbedding(embedding, shared, start, tuple(words)),
        NewTokenHead(head, own, start, active_adapters_of(model)),
    )
    model.set_input_embeddings(laid.embedding)
    model.set_output_embeddings(laid.head)
    model.config.vocab_size = max(len(embedding.weight), start + len(rows))  # type: ignore[arg-type]
    return laid


def new_tokens_of(model: nn.Module) -> NewTokens | None:
    """Return the layers of `model` that carry new rows, or None."""
    found = [m for m in model.modules() if isinstance(m, NewTokenEmbedding | NewTokenHead)]
    embedding = next((m for m in found if isinstance(m, NewTokenEmbedding)), None)
    head = next((m for m in found if isinstance(m, NewTokenHead)), None)
    return NewTokens(embedding, head) if embedding and head else None


def remove_tokens(model: nn.Module) -> None:
    """Give the model its own embedding and head back, if new rows lie over them, in place."""
    words = new_tokens_of(model)
    if words is not None:
        assert isinstance(model, PreTrainedModel)
        embedding = words.embedding.original
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(words.head.original)
        model.config.vocab_size = len(embedding.weight)  # type: ignore[arg-type]


def bake_tokens(model: PreTrainedModel, words: NewTokens) -> None:
    """Replace the layers that carry new rows by plain, larger ones, in place."""
    embedding, head = words.embedding.original, words.head.original
    _grow(embedding, words.embedding)
    embedding.num_embeddings = len(embedding.weight)  # type: ignore[arg-type, assignment]
    if words.tied:
        head.weight = embedding.weight
    else:
        _grow(head, words.head)
    if isinstance(head.bias, Tensor):
        none = torch.zeros(len(words.head.rows), device=head.bias.device)
        head.bias = nn.Parameter(_grown(head.bias, words.head.start, none), requires_grad=False)
    head.out_features = len(head.weight)  # type: ignore[arg-type, assignment]
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)


def _grow(layer: nn.Module, words: NewTokenEmbedding | NewTokenHead) -> None:
    weight = _grown(layer.weight, words.start, words.rows.detach())  # type: ignore[arg-type]
    layer.weight = nn.Parameter(weight, requires_grad=False)


def _grown(values: Tensor, start: int, new: Tensor) -> Tensor:
    return torch.cat([values[:start], new.to(values.dtype), values[start + len(new) :]])


def _pieces(word: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # In running text a word follows a space, which many tokenizers make part of its first piece.
    bare = tokenizer.encode(word, add_special_tokens=False)
    spaced = tokenizer.encode(f" {word}", add_special_tokens=False)
    return min(bare, spaced, key=len)


def _mean_rows(weight: Tensor, pieces: list[list[int]]) -> Tensor:
    return torch.stack([weight[ids].to(torch.float32).mean(dim=0) for ids in pieces])
