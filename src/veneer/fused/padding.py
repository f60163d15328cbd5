"""Rows of models that take no packed ones: padded, in passes of rows of like length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from veneer.models.block_buffers import passes_of

# Padding that one pass more has to save: weights are read, and quantized ones dequantized, again.
PASS_TOKENS = 128.0


def pass_tokens_of(model: PreTrainedModel, *, has_experts: bool) -> float:
    """Return how many tokens of padding one pass more has to save. None is enough where it launches
    kernels on a card, reads experts for few tokens, or brings weights from other processes, the
    host or files: all processes have to make equally many passes."""
    is_plain = model.device.type == "cpu" and not has_experts and passes_of(model) is None
    return PASS_TOKENS if is_plain else math.inf


def padded(
    tokens: NDArray[np.int64], lengths: Sequence[int]
) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]:
    """Return packed rows as padded ones, (rows, longest), with their mask; and where the tokens are
    among these, (tokens,). Padding is a token of the batch, as packed batches are filled up."""
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    rows = np.full(mask.shape, tokens[0])
    rows[mask] = tokens
    return {"input_ids": rows, "attention_mask": mask.astype(np.int64)}, np.flatnonzero(mask)


def runs_of(lengths: Sequence[int], cost: float) -> list[list[int]]:
    """Return lengths of rows, in their order, as the runs whose padding to their longest row, with
    `cost` tokens for each run, is least."""
    rows = np.array(lengths)
    least, first = np.zeros(len(rows) + 1), np.zeros(len(rows) + 1, dtype=np.int64)
    for end in range(1, len(rows) + 1) if cost < np.inf else ():
        longest = np.maximum.accumulate(rows[:end][::-1])[::-1]  # of the rows from each one to end
        totals = least[:end] + longest * np.arange(end, 0, -1) + cost
        first[end] = totals.argmin()
        least[end] = totals[first[end]]
    cuts = [len(rows)]
    while cuts[-1]:
        cuts.append(int(first[cuts[-1]]))
    return [[*lengths[start:end]] for start, end in pairwise(cuts[::-1])]


def in_runs(
    tokens: NDArray[np.int64], labels: NDArray[np.int64], runs: Sequence[Sequence[int]]
) -> Iterator[tuple[dict[str, NDArray[np.int64]], NDArray[np.int64], NDArray[np.int64]]]:
    """Yield each run of packed rows, given by their lengths, as padded arguments, and its tokens'
    labels and places; a row alone has no mask."""
    ends = list(accumulate(map(sum, runs)))[:-1]
    for run, own, own_labels in zip(
        runs, np.split(tokens, ends), np.split(labels, ends), strict=True
    ):
        arguments, places = padded(own, run)
        if len(run) == 1:
            del arguments["attention_mask"]
        yield arguments, own_labels, places
