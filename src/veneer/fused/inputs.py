"""What a pass reads of a batch: made on the host, where its shapes are known, and sent at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import masking_utils

from veneer.kernels.cross_entropy import IGNORED, Labelled, bounds
from veneer.kernels.transfer import has_queue, sent_together


@dataclass(frozen=True, eq=False)
class PassInputs:
    """The arguments of a pass, and what its loss needs.

    arguments  of the decoder or the model by name, (rows, tokens) each
    labels     which of its rows have a label, of all (rows · tokens); or the label of each token
    places     where among all these rows the tokens are that `labels` has; None: all in order
    """

    arguments: dict[str, Tensor]
    labels: Labelled | Tensor
    places: Tensor | None = None

    @classmethod
    def sent(
        cls,
        arguments: Mapping[str, NDArray[np.int64]],
        labels: NDArray[np.int64],
        device: torch.device,
        *,
        labelled_alone: bool,
        places: NDArray[np.int64] | None = None,
    ) -> PassInputs:
        """Return the inputs on a device. labels (tokens,): IGNORED where there is none;
        labelled_alone: whether the loss reads labelled rows and no others."""
        if labelled_alone:
            labelled = np.flatnonzero(labels != IGNORED)
            labels = labels[labelled]
            places = labelled if places is None else places[labelled]
        more = [labels] if places is None else [labels, places]
        tensors = sent_together([*arguments.values(), *more], device)
        by_name = dict(zip(arguments, tensors, strict=False))
        own, *rows = tensors[len(arguments) :]
        if labelled_alone:
            return cls(by_name, Labelled(rows[0], own, *bounds(labels)))
        return cls(by_name, own, rows[0] if rows else None)


def padded(
    tokens: NDArray[np.int64], lengths: Sequence[int]
) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.int64]]:
    """Return packed rows as padded ones, (rows, longest), with their mask; and where the tokens are
    among these, (tokens,). Padding is a token of the batch, as packed batches are filled up."""
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    rows = np.full(mask.shape, tokens[0])
    rows[mask] = tokens
    return {"input_ids": rows, "attention_mask": mask.astype(np.int64)}, np.flatnonzero(mask)


@contextmanager
def unread_masks(device: torch.device) -> Iterator[None]:
    """Let transformers take each mask as one that hides something, instead of reading from a device
    with a queue whether it does: the masks that it makes then are the same ones."""
    if not has_queue(device):
        yield
        return
    module: Any = masking_utils
    before = module.is_tracing
    module.is_tracing = lambda tensor=None: tensor is not None or before()
    try:
        yield
    finally:
        module.is_tracing = before


def by_rows(packed: NDArray[np.int64], lengths: Sequence[int]) -> list[NDArray[np.int64]]:
    """Return each row of packed numbers, (tokens,)."""
    return np.split(packed, list(accumulate(lengths))[:-1])
