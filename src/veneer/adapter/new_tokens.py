"""Tokens that the base does not have: found in texts, added to the tokenizer, with rows that train.

Only the new rows train and are saved. The base's own rows are never copied and never change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.active import ActiveAdapters, active_adapters_of
from veneer.adapter.wrapper import Wrapper, unwrapped
from veneer.data.words import count_words
from veneer.errors import ConfigError, ModelError, deprecated
from veneer.models.block_buffers import whole
from veneer.quant.embedding import QuantizedEmbedding
from veneer.quant.weight import QuantizedLinear, kept_weight


class NewTokenEmbedding(Wrapper):
    """Return the new row for ids from `start` on, and the original's row for every other id.

    tokens: the texts of the new tokens, in the order of their ids.
    """

    def __init__(
        self, original: nn.Module, rows: nn.Parameter, start: int, tokens: tuple[str, ...]
    ) -> None:
        super().__init__(original)
        self.rows = rows  # (new, dim), float32
        self.start = start
        self.tokens = tokens

    def forward(self, ids: Tensor) -> Tensor:
        base = self.original(ids.clamp(max=self.original.weight.shape[0] - 1))  # type: ignore[index]
        local = ids - self.start
        is_new = (local >= 0) & (local < len(self.rows))
        new = F.embedding(local.clamp(0, len(self.rows) - 1), self.rows)
        new = new.to(base.dtype) * getattr(self.original, "embed_scale", 1.0)
        return torch.where(is_new.unsqueeze(-1), new, base)


class NewTokenHead(Wrapper):
    """Return the original's logits, with those of the new tokens from `start` on.

    While no adapter acts, the new tokens have the logit -∞, so that the base never gives one.
    """

    def __init__(
        self, original: nn.Module, rows: nn.Parameter, start: int, active_adapters: ActiveAdapters
    ) -> None:
        super().__init__(original)
        self.rows = rows  # (new, dim), float32
        self.start = start
        self.active_adapters = active_adapters

    def forward(self, x: Tensor) -> Tensor:
        logits = self.original(x)  # (..., vocab)
        new = F.linear(x, self.rows.to(x.dtype))  # (..., new)
        if self.active_adapters.idle:
            new = torch.full_like(new, -torch.inf)
        end = self.start + len(self.rows)
        return torch.cat([logits[..., : self.start], new, logits[..., end:]], dim=-1)


@dataclass(frozen=True)
class NewTokens:
    """The layers of a model that have the rows of new tokens."""

    embedding: NewTokenEmbedding
    head: NewTokenHead

    @property
    def tied(self) -> bool:
        """Whether embedding and head share their new rows."""
        return self.embedding.rows is self.head.rows

    def parameters(self) -> list[nn.Parameter]:
        """Return the new rows, shared ones once."""
        return [self.embedding.rows] if self.tied else [self.embedding.rows, self.head.rows]


FEWEST_PIECES, FEWEST_TIMES = 4, 3  # tokens of a word, and how often it occurs
NO_NEW_TOKENS = (
    f"no word occurs at least {FEWEST_TIMES} times in the rows and has {FEWEST_PIECES} tokens or "
    "more; name words yourself (--new-words a,b)"
)


def find_new_tokens(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    pieces: int = FEWEST_PIECES,
    times: int = FEWEST_TIMES,
    most: int = 64,
) -> list[str]:
    """Return at most `most` words of the texts that have many tokens each, the most frequent first.

    A word counts if it occurs at least `times` times and has at least `pieces` tokens.
    """
    return tokens_for(count_words(texts), tokenizer, pieces=pieces, times=times, most=most)


def tokens_for(
    counts: Counter[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    pieces: int = FEWEST_PIECES,
    times: int = FEWEST_TIMES,
    most: int = 64,
) -> list[str]:
    """Return what `find_new_tokens` does, from how often each word occurs."""
    frequent = [word for word, count in counts.most_common() if count >= times]
    return [word for word in frequent if len(_pieces(word, tokenizer)) >= pieces][:most]


def add_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> NewTokens:
    """Make each word one token of the tokenizer, with a trained row in the model, in place.

    A new row starts as the mean of the rows of the tokens that the word had before. Raises
    ConfigError for words that cannot be tokens, ModelError for a model without embeddings.
    """
    check_new_tokens(words, tokenizer)
    pieces = [_pieces(word, tokenizer) for word in words]
    start = len(tokenizer)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None or start > kept_weight(embedding).shape[0]:
        raise ModelError("New words need a model with an embedding and a head for every token.")
    if isinstance(embedding, QuantizedEmbedding):
        raise ModelError("New words need an embedding that is not quantized.")
    if isinstance(embedding, Wrapper) or isinstance(head, Wrapper):
        raise ModelError("New words are added once, and before adapters of embedding and head.")
    with whole(embedding, head):
        rows = _mean_rows(embedding.weight, pieces)  # type: ignore[arg-type]
        head_rows = None if is_tied(embedding, head) else _mean_rows(head.weight, pieces)
    extend_tokenizer(tokenizer, words)
    return attach_token_rows(model, words, rows, head_rows, start=start)


def check_new_tokens(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError, which names them all, for words that cannot be tokens."""
    problems = []
    vocabulary = tokenizer.get_vocab()
    for word in words:
        if not word or any(character.isspace() for character in word):
            problems.append(f"{word!r} is empty or has a space in it")
        elif word in vocabulary or len(_pieces(word, tokenizer)) < 2:
            problems.append(f"{word!r} is a token already")
    if len(set(words)) < len(words):
        problems.append("some are named twice")
    if problems:
        raise ConfigError(f"These new words cannot be added: {'; '.join(problems)}.")


def add_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> NewTokens:
    """Do what `add_tokens` does, whose name this was in earlier versions."""
    deprecated("veneer.add_words", since="0.1", use="veneer.add_tokens")
    return add_tokens(model, tokenizer, words)


def is_tied(embedding: nn.Module, head: nn.Module) -> bool:
    """Return whether embedding and head are one weight, which a quantized head never is."""
    embedding, head = unwrapped(embedding), unwrapped(head)
    return not isinstance(head, QuantizedLinear) and head.weight is embedding.weight


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Add tokens that match whole words only, exactly as they are written."""
    added = [AddedToken(token, single_word=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(added)


def attach_token_rows(
    model: PreTrainedModel,
    tokens: Sequence[str],
    rows: Tensor,
    head_rows: Tensor | None,
    *,
    start: int,
) -> NewTokens:
    """Attach the rows (new, dim) of new tokens to the model's embedding and head, in place.

    Without `head_rows`, both share `rows`. `start` is the first token's id.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding is not None
    assert head is not None
    first = nn.Parameter(rows.to(torch.float32))
    last = first if head_rows is None else nn.Parameter(head_rows.to(torch.float32))
    new = NewTokens(
        NewTokenEmbedding(embedding, first, start, tuple(tokens)),
        NewTokenHead(head, last, start, active_adapters_of(model)),
    )
    model.set_input_embeddings(new.embedding)
    model.set_output_embeddings(new.head)
    model.config.vocab_size = max(len(embedding.weight), start + len(rows))  # type: ignore[arg-type]
    return new


def new_tokens_of(model: nn.Module) -> NewTokens | None:
    """Return the layers of `model` that have the rows of new tokens, or None."""
    embedding = next((m for m in model.modules() if isinstance(m, NewTokenEmbedding)), None)
    head = next((m for m in model.modules() if isinstance(m, NewTokenHead)), None)
    return NewTokens(embedding, head) if embedding and head else None


def remove_tokens(model: nn.Module) -> None:
    """Give the model its own embedding and head back, if they have new tokens, in place."""
    new = new_tokens_of(model)
    if new is not None:
        assert isinstance(model, PreTrainedModel)
        embedding = new.embedding.original
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(new.head.original)
        model.config.vocab_size = len(embedding.weight)  # type: ignore[arg-type]


def merge_tokens(model: PreTrainedModel, new: NewTokens) -> None:
    """Replace the layers with new tokens by plain, larger ones, in place."""
    embedding, head = new.embedding.original, new.head.original
    _extend_weight(embedding, new.embedding)
    embedding.num_embeddings = len(embedding.weight)  # type: ignore[arg-type, assignment]
    if new.tied:
        head.weight = embedding.weight
    else:
        _extend_weight(head, new.head)
    if isinstance(head.bias, Tensor):
        zeros = torch.zeros(len(new.head.rows), device=head.bias.device)
        head.bias = nn.Parameter(_extended(head.bias, new.head.start, zeros), requires_grad=False)
    head.out_features = len(head.weight)  # type: ignore[arg-type, assignment]
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(head)


def _extend_weight(layer: nn.Module, new: NewTokenEmbedding | NewTokenHead) -> None:
    weight = _extended(layer.weight, new.start, new.rows.detach())  # type: ignore[arg-type]
    layer.weight = nn.Parameter(weight, requires_grad=False)


def _extended(values: Tensor, start: int, new: Tensor) -> Tensor:
    return torch.cat([values[:start], new.to(values.dtype), values[start + len(new) :]])


def _pieces(word: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the tokens that a word has, alone or behind a space."""
    # In running text a word follows a space, which many tokenizers make part of its first token.
    bare = tokenizer.encode(word, add_special_tokens=False)
    spaced = tokenizer.encode(f" {word}", add_special_tokens=False)
    return min(bare, spaced, key=len)


def _mean_rows(weight: Tensor, pieces: list[list[int]]) -> Tensor:
    return torch.stack([weight[ids].to(torch.float32).mean(dim=0) for ids in pieces])
