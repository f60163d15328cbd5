"""What is wrong with a run while it goes on: losses that stand out, numbers that are not finite, a
frozen base that changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from veneer.data.encode import Example
from veneer.errors import DivergedError, TrainingError, listed
from veneer.fused.forward import Forward
from veneer.processes.world import World
from veneer.training import checkpoint as checkpoints
from veneer.training.config import TrainConfig
from veneer.training.events import Skipped
from veneer.training.frozen import FrozenBase
from veneer.training.not_finite import in_base, in_rows, in_state
from veneer.training.spikes import MOST_IN_A_ROW, WINDOW, usual_and_most
from veneer.training.state import Progress, RunState
from veneer.training.step import Learnt
from veneer.training.verdict import rate_advice

MOST_SKIPS = 3  # steps in a row without a finite loss; going on after them makes no sense


class Watch:
    """Judges the steps of a run.

    forward: by which rows are computed one by one, once the run has begun
    frozen_base: the base as it was then, where that is to be watched
    detects_spikes: whether losses are alike from step to step
    unsaid: what there is to say of the step that has just ended
    """

    def __init__(
        self,
        model: PreTrainedModel,
        examples: Sequence[Example],
        config: TrainConfig,
        directory: Path | None,
        world: World,
        *,
        usual_lr: float,
    ) -> None:
        self.model, self.examples, self.config = model, examples, config
        self.directory, self.world, self.usual_lr = directory, world, usual_lr
        self.forward: Forward | None = None
        self.frozen_base: FrozenBase | None = None
        self.detects_spikes = True
        self.unsaid: list[str] = []

    def most_to_learn(self, progress: Progress) -> float:
        """Return the largest loss from which the step that begins may learn."""
        if self.config.on_spike == "warn":
            return math.inf
        return self._usual_and_most(progress, progress.step)[1]

    def step(
        self, state: RunState, number: int, rows: Sequence[int], learnt: Learnt, most: float
    ) -> Skipped | None:
        """Judge a step that has ended, and return why nothing was learnt in it, if that is so.

        rows: indices of its examples; most: the largest loss from which it might learn

        Raises DivergedError for the third in a row that is not finite, and for a loss that stands
        out where that is to end the run; TrainingError for a base that is not finite.
        """
        progress, loss = state.progress, learnt.loss
        usual, largest = self._usual_and_most(progress, number)
        if math.isfinite(loss):
            progress.losses = [*progress.losses, [number, loss]][-WINDOW - 1 :]
        is_left_out = most < loss < math.inf
        if not learnt.finite and not is_left_out:
            progress.skips += 1
            return self._not_finite(state, number, rows)
        progress.skips = 0
        progress.spikes = progress.spikes + 1 if is_left_out else 0
        if not is_left_out and not largest < loss < math.inf:
            return None
        text = f"The loss of step {number} is {loss:.3g}, where {usual:.3g} is usual"
        places = self._places(rows)
        if self.config.on_spike == "stop":
            raise DivergedError(
                f"{text}: nothing was learnt from it, and the run ends (--on-spike stop). Look at "
                f"its rows ({listed(places)}), and start anew (--force) with a lower --lr, or "
                f"with --on-spike warn or skip.{self._last_good()}"
            )
        if not is_left_out:
            self.unsaid.append(f"{text}. Its rows: {listed(places)}.")
            return None
        return Skipped(number, places, f"its loss is {loss:.3g}, where {usual:.3g} is usual")

    def check_base(self, *, all: bool = False) -> None:
        """Raise TrainingError where the frozen base is not what it was when the run began.

        all: look at all of it, and not at some pieces
        """
        changed = [] if self.frozen_base is None else self.frozen_base.changed(all=all)
        if self.world.any(bool(changed)):
            whose = listed(changed) if changed else "a weight of another process"
            raise TrainingError(
                f"The base is frozen, but {whose} has changed since the run began: a fault of this "
                "machine's memory, or other code that writes there. Nothing more is saved. Test "
                f"the memory, and go on by --resume.{self._last_good()}"
            )

    def _usual_and_most(self, progress: Progress, number: int) -> tuple[float, float]:
        """Return the loss that is usual before a step, and the largest that is no spike.

        The step just before is left out, for on a device with a queue its loss is not known yet.
        """
        if not self.detects_spikes or progress.spikes >= MOST_IN_A_ROW:
            return math.nan, math.inf
        return usual_and_most([loss for step, loss in progress.losses if step < number - 1])

    def _not_finite(self, state: RunState, number: int, rows: Sequence[int]) -> Skipped:
        places, skips = self._places(rows), state.progress.skips
        if skips == 1 and (names := in_base(self.model)):
            raise TrainingError(
                f"The base itself has numbers that are not finite, in {listed(names)}: nothing can "
                "be learnt over it. Take another copy of it, or another --dtype."
            )
        if skips == MOST_SKIPS:
            assert self.config.lr is not None
            suspects = f"the rows of that step ({listed(places)})"
            sources = self._sources(state, rows)
            raise DivergedError(
                f"Loss or gradient was not finite in {MOST_SKIPS} steps in a row, up to step "
                f"{number}. {rate_advice(self.config.lr, self.usual_lr, rows=suspects)}"
                + (f" Not finite: {listed(sources)}." if sources else "")
                + self._last_good()
            )
        return Skipped(number, places)

    def _sources(self, state: RunState, rows: Sequence[int]) -> list[str]:
        """Return what is not finite, in words, where one process can find out."""
        names = in_state(state.weights, state.optimizer)
        if names or self.world.size > 1 or self.forward is None:
            return names
        return in_rows(self.model, self.forward, self.examples, rows, state.optimizer)

    def _places(self, rows: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.examples[row].where for row in rows)

    def _last_good(self) -> str:
        last = checkpoints.last_good(self.directory) if self.directory else None
        return f" The last good checkpoint is {last}." if last else ""
