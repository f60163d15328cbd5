"""What a pass reads of a batch: made on the host, where its shapes are known, and sent at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
    labels     which of all (rows · tokens) have a label, in the order of the batch's tokens
    """

    arguments: dict[str, Tensor]
    labels: Labelled

    @classmethod
    def sent(
        cls,
        arguments: Mapping[str, NDArray[np.int64]],
        labels: NDArray[np.int64],
        device: torch.device,
        *,
        places: NDArray[np.int64] | None = None,
    ) -> PassInputs:
        """Return the inputs on a device. labels (tokens,): IGNORED where there is none; places:
        where among all rows of the pass these tokens are, in their order unless given."""
        labelled = np.flatnonzero(labels != IGNORED)
        targets = labels[labelled]
        rows = labelled if places is None else places[labelled]
        tensors = sent_together([*arguments.values(), targets, rows], device)
        by_name = dict(zip(arguments, tensors, strict=False))
        on_device, places_of_labels = tensors[len(arguments) :]
        return cls(by_name, Labelled(places_of_labels, on_device, *bounds(targets)))


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
