"""How the next token is chosen: a frozen, validated value that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn from the top."""

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
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens is {self.max_new_tokens}, but must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature is {self.temperature}, but must be at least 0")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}, but must be above 0 and at most 1")
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}, but must be at least 0")
        if problems:
            raise ConfigError("Nothing can be generated so: " + "; ".join(problems) + ".")

    def options(self) -> dict[str, Any]:
        """Return the arguments of transformers' `generate` that say the same."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature == 0:
            # What a model's own generation_config sets for sampling would only cause warnings.
            return {
                **options,
                "do_sample": False,
                "temperature": None,
                "top_p": None,
                "top_k": None,
            }
        return {
            **options,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
