"""What a reward model needs beside a run over pairs: a head of its own, asked at each row's end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from veneer.adapter.config import LoRA
from veneer.adapter.score import attach_score
from veneer.adapter.use import adapters, in_use
from veneer.data.encode import Example
from veneer.errors import ConfigError, DataError
from veneer.fused.forward import Forward
from veneer.fused.head import Head
from veneer.models.score import SCORE
from veneer.objectives.ranking import asked_at_its_end

SCORE_HEAD = Head(path=SCORE)


def begin_ranking(
    model: PreTrainedModel, examples: Sequence[Example], held_out: Sequence[Example], *, seed: int
) -> tuple[list[Example], list[Example]]:
    """Give the adapter that acts a head that trains, and return the rows as it reads them.

    Raises DataError for rows that are no pairs, ConfigError where no adapter of low rank acts.
    """
    if any(not example.second for example in [*examples[:1], *held_out[:1]]):
        raise DataError("reward learns from pairs; make them by load_examples(..., shape='pairs').")
    names = [*in_use(model)]
    if len(names) != 1 or not isinstance(adapters(model)[names[0]], LoRA):
        raise ConfigError("reward trains a head beside one adapter of low rank; attach one.")
    attach_score(model, names[0], seed=seed)
    return [*map(asked_at_its_end, examples)], [*map(asked_at_its_end, held_out)]


def with_score(forward: Forward) -> Forward:
    """Return how a reward model's numbers are computed: as the base's logits, but by its head."""
    return replace(forward, head=SCORE_HEAD)
