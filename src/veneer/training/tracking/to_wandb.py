"""Weights & Biases: its service, or with WANDB_MODE=offline its files in a directory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from veneer.errors import ConfigError
from veneer.training.tracking.tracker import Point

PROJECT = "veneer"


class WandB:
    """Writes to the project `place`; where it is empty to WANDB_PROJECT, or veneer. Its files are
    in WANDB_DIR, else below the run's directory."""

    name = "Weights & Biases"

    def __init__(self, place: str, out: Path) -> None:
        self.project = place or os.environ.get("WANDB_PROJECT") or PROJECT
        self.out = out
        self.run: Any = None
        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not wandb.login(
            prompt=False
        ):  # or it would ask, in the middle of a run
            raise ConfigError(
                "--track wandb: no key for Weights & Biases is here. Run `wandb login`, or set "
                "WANDB_MODE=offline and run `wandb sync` later."
            )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start a run, with the settings as its config."""
        place = Path(os.environ.get("WANDB_DIR") or self.out)
        place.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=self.project,
            name=self.out.name,
            dir=str(place),
            config=dict(settings),
            settings=wandb.Settings(silent=True, console="off", disable_code=True),
        )

    def log(self, points: Sequence[Point]) -> None:
        """Give them to wandb's own process."""
        for point in points:
            # Not step=: an evaluation comes after the step of the same number was sent.
            self.run.log({**point.numbers, "step": point.step})

    def end(self, outcome: str) -> None:
        """Wait for what is being sent, and end the run."""
        if self.run is not None:
            self.run.finish(exit_code=0 if outcome == "finished" else 1)
