"""Short runs of the training loop over a few random rows."""

from typing import Any

import veneer
from support.random_adapters import examples
from support.tiny_models import tiny
from veneer.training.events import Event

ROWS = examples([11, 7, 16, 9, 13, 8])
COURSE = veneer.TrainConfig(lr=0.01, tokens_per_step=30, warmup=0, clip=0)


def new_model(architecture: str = "llama", **options: Any) -> Any:
    config = veneer.LoRA(**{"rank": 2, "targets": "all"} | options)
    return veneer.attach(tiny(architecture), config, seed=0)


def run(model: Any, course: veneer.TrainConfig, rows: Any = ROWS, **options: Any) -> list[Event]:
    return list(veneer.train(model, rows, course, **options))


def of(kind: type, events: list[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]
