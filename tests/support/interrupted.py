"""Runs that end anywhere and go on, each time as a process of its own would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

import veneer
from support.random_adapters import examples, trained_weights
from support.tiny_models import tiny
from veneer.run_directory import RunDirectory
from veneer.training.events import Event, Step
from veneer.training.metrics import record

LENGTHS = [11, 7, 16, 9, 13, 8, 12, 10, 15, 6]
ROWS = examples(LENGTHS)
HELD_OUT = examples([9, 14, 7], seed=1)
COURSE = veneer.TrainConfig(
    epochs=2.5, lr=0.02, tokens_per_step=40, tokens_per_batch=20, eval_every=2, save_every=1
)
COURSES: dict[str, veneer.TrainConfig] = {
    "accumulation": COURSE,
    "constant": replace(COURSE, schedule="constant", warmup=2, weight_decay=0.1, clip=0),
    "seldom saved": replace(COURSE, save_every=3, eval_every=None),
    "patience": replace(COURSE, lr=1.0, eval_every=1, patience=2, epochs=9),
}


def new_model() -> Any:
    model = tiny("llama")
    del model.model.layers[1:]  # where runs end and go on concerns the layers little
    model.config.num_hidden_layers = 1
    return veneer.attach(model, veneer.LoRA(rank=2, dropout=0.3, targets="attention"), seed=0)


class Run:
    """A run in pieces: each piece has a model of its own, as a process of its own would have."""

    def __init__(self, place: Path, course: veneer.TrainConfig, **options: Any) -> None:
        self.place, self.course, self.options = place, course, options
        self.events: list[Event] = []
        self.weights: dict[str, Tensor] = {}

    def go(self, *, resume: bool, stop_at: int = 0, leave: Any = lambda event: False) -> None:
        """Train until the end, until `stop_at` asks for it, or until the process dies."""
        model = new_model()
        step = 0
        events = veneer.train(
            model,
            ROWS,
            self.course,
            directory=self.place / "checkpoints",
            resume=resume,
            should_stop=lambda: step == stop_at,
            **({"held_out": HELD_OUT} | self.options),
        )
        for event in (recorded := record(events, RunDirectory(self.place))):
            step = getattr(event, "step", step)
            self.events.append(event)
            if leave(event):
                recorded.close()
                events.close()
                break
        self.weights = trained_weights(model)

    def metrics(self) -> list[dict[str, Any]]:
        lines = RunDirectory(self.place).read_metrics()
        return [
            {key: value for key, value in line.items() if key not in ("seconds", "rss_bytes")}
            for line in lines
        ]


def steps_of(run: Run) -> int:
    return max(event.step for event in run.events if isinstance(event, Step))
