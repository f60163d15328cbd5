"""How many positions a model has."""

from __future__ import annotations

NAMES = ("max_position_embeddings", "max_seq_len")  # the second is MPT's


def own_context(config: object) -> int | None:
    """Return how many positions a model has by its configuration, None where they have no end."""
    return next(filter(None, (getattr(config, name, None) for name in NAMES)), None)
