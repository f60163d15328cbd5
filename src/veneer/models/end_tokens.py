"""The tokens at which a model ends its answers."""

from __future__ import annotations

from torch import nn


def end_tokens(model: nn.Module) -> list[int]:
    """Return the end tokens of a model's generation settings, none where they name none."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if ends is None else list(ends) if isinstance(ends, list) else [int(ends)]
