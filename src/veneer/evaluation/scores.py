"""How likely continuations are behind their contexts, in packed passes with their logits alone.

Continuations that differ in their last token only share a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import Batch
from veneer.errors import ConfigError
from veneer.fused.forward import choose_forward
from veneer.kernels.cross_entropy import CHUNK_LOGITS, Logits
from veneer.kernels.transfer import sent
from veneer.models.evaluating import evaluating

Tokens = Sequence[int]


@dataclass(frozen=True)
class Score:
    """log p of a continuation, in nats, and whether each of its tokens is the likeliest one."""

    log_p: float
    greedy: bool


@dataclass(eq=False)
class _Row:
    """Tokens that a pass reads, without the last one, which predicts nothing; and who asks."""

    tokens: tuple[int, ...]
    asking: list[int]
    labels: Tokens = ()  # the longest continuation of those that ask


class _AskedTokens:
    """Notes what a pass gives each asked token. It stands where a token loss does, and is zero.

    places (asked,): numbers of labelled rows, from 0 in their order. tokens (asked,).
    log_p (asked,), float32, and greedy (asked,), bool: what was noted, on the model's device.
    """

    step_logits: ClassVar[int] = CHUNK_LOGITS // 4  # which are held in float32, about twice

    def __init__(self, places: Tensor, tokens: Tensor) -> None:
        self.places, self.tokens = places, tokens
        self.log_p = torch.zeros(len(places), device=places.device)
        self.greedy = torch.zeros(len(places), dtype=torch.bool, device=places.device)

    def __call__(self, z: Tensor, first: int, out: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        """Note a chunk's rows."""
        y = logits(z.float())
        here = (self.places >= first) & (self.places < first + len(y))
        rows = (self.places - first).clamp(0, len(y) - 1)
        log_p = y[rows, self.tokens] - y.logsumexp(-1)[rows]
        self.log_p = torch.where(here, log_p, self.log_p)
        self.greedy = torch.where(here, y.argmax(-1)[rows] == self.tokens, self.greedy)
        return y.new_zeros(len(y)), out.zero_()


def scores(
    model: PreTrainedModel,
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    longest: int,
    tokens_per_batch: int = 2048,
) -> list[Score]:
    """Return how likely each continuation is behind its context, by the model as it is.

    pairs: contexts and continuations, neither empty. longest: tokens that the model reads at most;
    of a longer context the first ones are left out. Raises ConfigError for a longer continuation.
    """
    rows = _rows(pairs, longest)
    if not rows:
        return []
    log_p, greedy = np.zeros(len(pairs)), np.ones(len(pairs), dtype=bool)
    # Two tokens at least, as a proof of packing takes nothing from a single one.
    probes = [Example(t := [*row.tokens, row.labels[-1]], t, "", 0) for row in rows[:3]]
    forward, _ = choose_forward(model, probes)
    with torch.no_grad(), evaluating(model), forward.installed(model):
        for batch_rows in _batches(rows, tokens_per_batch):
            ends = np.cumsum([len(row.labels) for row in batch_rows]).tolist()
            asking = [
                (i, end) for row, end in zip(batch_rows, ends, strict=True) for i in row.asking
            ]
            lengths = [len(pairs[i][1]) for i, _ in asking]
            places = [
                range(end - length, end) for (_, end), length in zip(asking, lengths, strict=True)
            ]
            asked = _AskedTokens(
                sent(list(chain.from_iterable(places)), model.device),
                sent(list(chain.from_iterable(pairs[i][1] for i, _ in asking)), model.device),
            )
            forward.losses(model, _packed(batch_rows), asked)
            of_pair = np.repeat([i for i, _ in asking], lengths)
            np.add.at(log_p, of_pair, asked.log_p.double().cpu().numpy())
            np.logical_and.at(greedy, of_pair, asked.greedy.cpu().numpy())
    return [Score(*both) for both in zip(log_p.tolist(), greedy.tolist(), strict=True)]


def _rows(pairs: Sequence[tuple[Tokens, Tokens]], longest: int) -> list[_Row]:
    """Return the rows that pairs need, the longest first. Raises ConfigError."""
    rows: dict[tuple[int, ...], _Row] = {}
    for i, (context, continuation) in enumerate(pairs):
        assert context
        assert continuation
        if len(continuation) > longest:
            raise ConfigError(
                f"A continuation of {len(continuation):,} tokens does not fit into the model's "
                f"context of {longest:,}."
            )
        tokens = (*context, *continuation)[-longest - 1 : -1]
        row = rows.setdefault(tokens, _Row(tokens, []))
        row.asking.append(i)
        row.labels = max(row.labels, continuation, key=len)
    return sorted(rows.values(), key=lambda row: -len(row.tokens))


def _batches(rows: Sequence[_Row], limit: int) -> Iterator[list[_Row]]:
    """Yield rows in their order, in batches of at most `limit` tokens, or one row."""
    batch: list[_Row] = []
    tokens = 0
    for row in rows:
        if batch and tokens + len(row.tokens) > limit:
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += len(row.tokens)
    if batch:
        yield batch


def _packed(rows: Sequence[_Row]) -> Batch:
    """Return rows as a batch whose labels are at the places that are asked for."""
    lengths = np.array([len(row.tokens) for row in rows], dtype=np.int64)
    labels = [[UNLABELLED] * (len(r.tokens) - len(r.labels)) + list(r.labels) for r in rows]
    return Batch(
        tokens=np.array([token for row in rows for token in row.tokens], dtype=np.int64),
        labels=np.array(list(chain.from_iterable(labels)), dtype=np.int64),
        positions=np.concatenate([np.arange(length) for length in lengths]),
        lengths=lengths,
        rows=np.arange(len(rows)),
    )
