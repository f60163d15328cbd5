"""A step that a device was asked for, and whose results are on their way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from veneer.kernels.transfer import OnTheWay
from veneer.serve.engine.row import Row
from veneer.serve.engine.sampler import Drawn

# Guesses behind a row's newest token, each with the logits (vocab,) of what follows it.
Draft = Sequence[tuple[int, Tensor]]


@dataclass(frozen=True, eq=False)
class Scores:
    """What `Row.scores` gives of a prompt's tokens."""

    row: Row
    coming: OnTheWay
    is_last: bool


@dataclass(frozen=True, eq=False)
class Issued:
    """What a step computes: the next tokens of rows, each with its draft, and scores of prompts."""

    rows: Sequence[Row]
    drawn: Drawn | None
    drafts: Sequence[Draft]
    scores: Sequence[Scores]
