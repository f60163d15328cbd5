"""How many threads a training step is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from veneer.training.choose import hidden_size_of

# MiniGPT's. At this width a second thread saves a fifth of a step at most, on a machine that has
# nothing else to do, and costs half of it and more elsewhere (docs/performance.md).
WIDTH_OF_ONE_THREAD = 64


def threads_for(model: PreTrainedModel) -> int:
    """Return how many threads are to compute a model: one for a narrow one, else torch's number.

    The model alone decides and not how busy the machine is: other threads add sums up in another
    order, and the same run has to give the same bits again.
    """
    width = hidden_size_of(model.config)
    narrow = width is not None and width <= WIDTH_OF_ONE_THREAD
    return 1 if narrow else torch.get_num_threads()


@contextmanager
def worthwhile_threads(model: PreTrainedModel) -> Iterator[None]:
    """Compute with as many threads as the model is worth until the context ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads_for(model))
    try:
        yield
    finally:
        torch.set_num_threads(before)
