"""Evaluation mode for a while: no dropout, and the model's own mode again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a model in evaluation mode until the context ends."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
