"""How to train: a frozen, validated value that imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from veneer.errors import ConfigError
from veneer.fused.recompute import Recompute

Schedule = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True)
class TrainConfig:
    """The course of a training run. Raises ConfigError, which lists everything that is wrong."""

    epochs: float = 1.0
    """Passes over the rows."""
    steps: int | None = None
    """Optimizer steps, whatever the epochs."""
    lr: float | None = None
    """Peak learning rate of AdamW; what suits the method unless given (2e-4 for LoRA)."""
    lora_plus_ratio: float | None = None
    """LoRA+: B's learning rate as a multiple of A's; 4 to 16 are usual."""
    schedule: Schedule = "cosine"
    """Course of the learning rate after warm-up: constant, or falling to zero."""
    warmup: float = 0.03
    """Steps over which the learning rate rises; below 1, a share of all steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    tokens_per_step: int = 2048
    """Real tokens in an optimizer step, at most."""
    tokens_per_batch: int | None = None
    """Real tokens in one forward and backward pass, at most; smaller needs less memory."""
    recompute: Recompute = "none"
    """What is computed again in the backward pass instead of kept: nothing, each layer's inner
    projections, or whole layers. Less memory, more time, the same result."""
    seed: int = 0
    """Decides the start of A, the order of rows and dropout."""
    save_every: int | None = None
    """Steps between checkpoints; at the end of each epoch unless given."""
    eval_every: int | None = None
    """Steps between evaluations; at the end of each epoch unless given."""
    patience: int | None = None
    """Stop after so many evaluations without a better one."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value!r}, but must be {rule}"
            for name, value, good, rule in (
                ("epochs", self.epochs, 0 < self.epochs < math.inf, "above 0"),
                ("steps", self.steps, self.steps is None or self.steps > 0, "above 0"),
                ("lr", self.lr, self.lr is None or 0 < self.lr < math.inf, "above 0"),
                (
                    "lora_plus_ratio",
                    self.lora_plus_ratio,
                    self.lora_plus_ratio is None or 0 < self.lora_plus_ratio < math.inf,
                    "above 0",
                ),
                ("warmup", self.warmup, 0 <= self.warmup < math.inf, "at least 0"),
                (
                    "weight_decay",
                    self.weight_decay,
                    0 <= self.weight_decay < math.inf,
                    "at least 0",
                ),
                ("clip", self.clip, 0 <= self.clip < math.inf, "at least 0"),
                ("tokens_per_step", self.tokens_per_step, self.tokens_per_step > 0, "above 0"),
                ("seed", self.seed, 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
                (
                    "schedule",
                    self.schedule,
                    self.schedule in ("constant", "cosine", "linear"),
                    "constant, cosine or linear",
                ),
                (
                    "recompute",
                    self.recompute,
                    self.recompute in ("none", "selective", "full"),
                    "none, selective or full",
                ),
                *(
                    (name, value, value is None or value > 0, "above 0")
                    for name, value in (
                        ("tokens_per_batch", self.tokens_per_batch),
                        ("save_every", self.save_every),
                        ("eval_every", self.eval_every),
                        ("patience", self.patience),
                    )
                ),
            )
            if not good
        ]
        if problems:
            raise ConfigError("This run cannot be: " + "; ".join(problems) + ".")

    @property
    def batch_tokens(self) -> int:
        """Tokens of one pass: those of a step unless fewer were asked for."""
        return min(self.tokens_per_batch or self.tokens_per_step, self.tokens_per_step)

    def lr_at(self, step: int, steps: int) -> float:
        """Return the learning rate of `step` (from 1) of `steps`: warm-up, then the schedule."""
        assert self.lr is not None
        rise = self.warmup if self.warmup >= 1 else round(self.warmup * steps)
        if step <= rise:
            return self.lr * step / rise
        if self.schedule == "constant":
            return self.lr
        # The step after the last would be at zero, so that the last one still moves.
        part = (step - rise - 1) / max(1, steps - rise)
        if self.schedule == "linear":
            return self.lr * (1 - part)
        return self.lr * 0.5 * (1 + math.cos(math.pi * part))
