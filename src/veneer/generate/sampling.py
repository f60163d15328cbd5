"""The settings of a sampler: a frozen, validated value that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.checks import FRACTION, at_least, check_config


@dataclass(frozen=True)
class Sampling:
    """How a sampler picks the next token: the likeliest at temperature 0, else by a draw.

    Raises ConfigError, which lists everything that is wrong at once.
    """

    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; 1 draws from the model's own distribution."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw only from this many of the likeliest tokens; 0 sets no such bound."""
    seed: int | None = None
    """Makes draws repeatable."""

    def __post_init__(self) -> None:
        check_config(
            self,
            opening="Nothing can be generated so",
            rules={
                "max_new_tokens": at_least(1),
                "temperature": at_least(0),
                "top_p": FRACTION,
                "top_k": at_least(0),
            },
        )

    def options(self) -> dict[str, Any]:
        """Return these settings as arguments of transformers' `generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature == 0:
            # Without these, values of the model's own generation_config would only cause warnings.
            return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return options | {"do_sample": True} | drawn
