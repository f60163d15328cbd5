"""How to train: a frozen, validated value that imports no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from veneer.checks import ABOVE_0, at_least, check_config, one_of, whole_number
from veneer.fused.recompute import Recompute
from veneer.plan.config import OptimizerName

Schedule = Literal["constant", "cosine", "linear"]
OnSpike = Literal["warn", "skip", "stop"]
# Settings on which the course of the weights does not depend.
NOT_OF_THE_COURSE = (
    *("save_every", "keep", "keep_best", "recompute", "context_parallel"),
    *("shard", "device", "offload", "replay_passes"),
)
# Settings that are younger than the oldest checkpoints, which lack them; a run in which they have
# these values is the run of such a checkpoint.
YOUNGER = {"optimizer": "adamw", "on_spike": "warn"}
SCHEDULE = {"epochs", "steps", "lr", "schedule", "warmup"}  # which decide each step's rate
# Settings with which a run may go on otherwise than it began: what trains, the order of the rows
# and the optimizer's moments mean the same under all of them.
CHANGEABLE = (
    "epochs",
    "steps",
    "lr",
    "schedule",
    "warmup",
    "weight_decay",
    "clip",
    "dropout",
    "tokens_per_batch",
    "eval_every",
    "patience",
)
TOKENS_PER_PASS = 4096  # of a pass that several runs share, at most, unless asked otherwise


@dataclass(frozen=True)
class TrainConfig:
    """The course of a training run, where None is a choice that the rows and the base decide
    (`training/choose.py`). Raises ConfigError, which lists everything that is wrong.
    """

    epochs: float | None = None
    """Passes over the rows; chosen by how many there are unless given."""
    steps: int | None = None
    """Optimizer steps, whatever the epochs."""
    lr: float | None = None
    """Peak learning rate of AdamW; chosen by the method and the base's width unless given. `veneer
    tune --lr auto` chooses it by a short search before the run."""
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
    optimizer: OptimizerName = "adamw"
    """AdamW with moments in float32; in 8 bits, a quarter of the memory (adamw8bit); or in 8 bits
    that leave a CUDA card where it is full (paged-adamw8bit)."""
    tokens_per_step: int | None = None
    """Real tokens in an optimizer step, at most; chosen by how many there are unless given."""
    tokens_per_batch: int | None = None
    """Real tokens in one forward and backward pass, at most; smaller needs less memory."""
    recompute: Recompute = "none"
    """What is computed again in the backward pass instead of kept: nothing, each layer's inner
    projections, or whole layers; or what is kept is kept on the disk. Less memory, more time, the
    same result."""
    replay_passes: bool = False
    """Replay passes of few sizes as CUDA graphs, once each has given what the pass gives: for
    one process and small models, whose kernels take less time than asking for them."""
    context_parallel: int = 1
    """Processes that share each row, for rows that one cannot hold: each computes its own tokens,
    and keys and values go between them."""
    on_spike: OnSpike = "warn"
    """What becomes of a step whose loss stands out from those before it: warn says so; skip learns
    nothing from it; stop ends the run."""
    seed: int = 0
    """Decides the start of A, the order of rows and dropout."""
    save_every: int | None = None
    """Steps between checkpoints, beside those at the end of each epoch."""
    keep: int = 2
    """Keep this many of the newest checkpoints, beside those of the best evaluations."""
    keep_best: int | None = None
    """Keep the checkpoints of this many evaluations, the best, beside the newest ones; just one
    best unless given."""
    eval_every: int | None = None
    """Steps between evaluations, beside those at the end of each epoch."""
    patience: int | None = None
    """Stop after this many evaluations without a better one."""

    def __post_init__(self) -> None:
        count = whole_number(1)
        check_config(
            self,
            opening="This run cannot be",
            rules={
                "epochs": ABOVE_0,
                "steps": count,
                "lr": ABOVE_0,
                "lora_plus_ratio": ABOVE_0,
                "schedule": one_of(Schedule),
                "warmup": at_least(0),
                "weight_decay": at_least(0),
                "clip": at_least(0),
                "optimizer": one_of(OptimizerName),
                "tokens_per_step": count,
                "tokens_per_batch": count,
                "recompute": one_of(Recompute),
                "context_parallel": count,
                "on_spike": one_of(OnSpike),
                "seed": whole_number(0, most=2**63 - 1),
                "save_every": count,
                "keep": count,
                "keep_best": count,
                "eval_every": count,
                "patience": count,
            },
        )

    @property
    def course(self) -> dict[str, Any]:
        """The settings on which the course of the weights depends, as checkpoints have them."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in NOT_OF_THE_COURSE and YOUNGER.get(name, ...) != value
        }

    @property
    def batch_tokens(self) -> int:
        """Tokens of one pass: those of a step unless fewer were asked for."""
        assert self.tokens_per_step is not None
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
        share_done = (step - rise - 1) / max(1, steps - rise)
        if self.schedule == "linear":
            return self.lr * (1 - share_done)
        return self.lr * 0.5 * (1 + math.cos(math.pi * share_done))
