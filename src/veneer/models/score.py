"""The head of a reward model: one number for each token, of which that of a row's last one counts.

It stands where transformers' models for sequence classification have theirs, so that PEFT's files
of reward models (`task_type` SEQ_CLS, `modules_to_save` of `score`) hold the same weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.errors import ModelError

SCORE = "score"
SCORE_WEIGHT = f"{SCORE}.weight"  # (1, hidden)


class Score(nn.Linear):
    """The head that was added to a base: zero in itself, as each adapter brings its own weight."""


def score_size(model: nn.Module) -> int:
    """Return how many numbers a token has before the head."""
    return int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]


def add_score(model: PreTrainedModel) -> None:
    """Add the head to a model that has none, frozen. Raises ModelError for a model that has another
    module in its place."""
    if isinstance(getattr(model, SCORE, None), Score):
        return
    if is_own(model):
        raise ModelError(
            "This model is a classifier already, and its head is no reward model's: name the "
            "language model as the base."
        )
    head = Score(score_size(model), 1, bias=False, device=model.device, dtype=model.dtype)
    nn.init.zeros_(head.weight)
    model.add_module(SCORE, head.requires_grad_(False))


def is_own(model: nn.Module) -> bool:
    """Return whether a model came with a head of this name: it is a classifier."""
    head = getattr(model, SCORE, None)
    return head is not None and not isinstance(head, Score)


def score_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weight of the head as every language model can have it, by its path, without
    numbers; nothing of a classifier, which has its own."""
    if is_own(model):
        return {}
    size = getattr(model.config.get_text_config(), "hidden_size", None)  # type: ignore[union-attr,operator]
    return {} if size is None else {SCORE_WEIGHT: torch.empty(1, size, device="meta")}


def remove_score(model: nn.Module) -> None:
    """Remove the head, if it was added."""
    if isinstance(getattr(model, SCORE, None), Score):
        delattr(model, SCORE)
