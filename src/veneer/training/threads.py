"""How many threads a training step is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from veneer.training.choose import hidden_size_of

# Up to this width operations are so short that threads wait for one another most of the time.
WIDTH_OF_ONE_THREAD = 128


@contextmanager
def worthwhile_threads(model: PreTrainedModel) -> Iterator[None]:
    """Compute with one thread where the model is small, and with torch's number otherwise.

    It is decided by the model alone and not by how busy the machine is: sums are made in another
    order with other threads, and the same run has to give the same bits again.
    """
    before = torch.get_num_threads()
    width = hidden_size_of(model.config)
    if width is None or width > WIDTH_OF_ONE_THREAD or model.device.type != "cpu":
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
