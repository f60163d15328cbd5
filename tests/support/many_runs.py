"""Jobs that differ in all that jobs may differ in, each alone and all together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import veneer
from support.random_adapters import examples
from support.tiny_models import tiny
from veneer.adapter.use import acting
from veneer.training.events import Ended, Evaluated, Event, Failed, Skipped, Step
from veneer.training.many.running import Job
from veneer.training.many.train import train_many

COURSE = veneer.TrainConfig(epochs=2, lr=0.02, tokens_per_step=40, save_every=1)


@dataclass(frozen=True)
class Kind:
    """A job: its adapter, its rows by their lengths, and its course."""

    lora: Mapping[str, Any]
    lengths: tuple[int, ...] = (11, 7, 16, 9, 13, 8)
    course: Mapping[str, Any] = field(default_factory=dict)
    held_out: tuple[int, ...] = ()


KINDS: dict[str, Kind] = {
    "qv": Kind({"rank": 2, "targets": "qv", "dropout": 0.3}, course={"tokens_per_batch": 20}),
    "dora": Kind({"rank": 3, "targets": "all", "dora": True}, (5, 19, 30, 8)),
    "plus": Kind(
        {"rank": 4, "targets": "mlp", "rslora": True},
        (25, 3, 14, 9),
        {"lora_plus_ratio": 4.0, "schedule": "linear", "weight_decay": 0.1},
        (12, 5),
    ),
    "patience": Kind(
        {"rank": 1, "targets": "attention", "lora_fa": True},
        (18, 6, 10, 21, 4),
        {"lr": 1.0, "eval_every": 1, "patience": 2, "epochs": 9, "tokens_per_step": 25},
        (9, 14),
    ),
}


def course(kind: Kind) -> veneer.TrainConfig:
    return replace(COURSE, **kind.course)


def one_by_one(forward: Any, model: Any, batches: Any, **_: Any) -> Tensor:
    """Return the losses of a pass for each batch alone: what `backward_together` has to equal."""
    losses = []
    for each in batches:
        with acting(model, each.adapter), each.random.drawn():
            loss = each.loss(forward.losses(model, each.batch))
            (loss / each.divisor).backward()
        losses.append(loss.detach())
    return torch.stack(losses)


def rows(kind: Kind, *, seed: int = 0) -> dict[str, Any]:
    return {
        "examples": examples(list(kind.lengths), seed=seed),
        "held_out": examples(list(kind.held_out), seed=seed + 100),
    }


@dataclass
class Result:
    """What became of a job: its events, and the weights of its adapter."""

    events: list[Event]
    weights: dict[str, Tensor]

    @property
    def losses(self) -> list[float]:
        return [e.loss for e in self.events if isinstance(e, Step)]

    def numbers(self) -> dict[str, Tensor]:
        """Return the losses, those on held-out rows, and all weights, end to end."""
        held_out = [e.eval_loss for e in self.events if isinstance(e, Evaluated)]
        return {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "held-out losses": torch.tensor(held_out, dtype=torch.float64),
            "weights": torch.cat([w.double().flatten() for w in self.weights.values()]),
        }

    def plain(self) -> list[Event]:
        """Return the events without what is measured in each run anew, and without places."""
        return [
            replace(e, seconds=0.0, rss_bytes=0) if isinstance(e, Step) else e
            for e in self.events
            if isinstance(e, Step | Evaluated | Skipped)
        ]


def weights_of(model: Any, name: str) -> dict[str, Tensor]:
    return {
        path.replace(f".adapters.{name}.", "."): weight.detach().clone()
        for path, weight in model.named_parameters()
        if f".adapters.{name}." in path
    }


def alone(
    kind: Kind,
    place: Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> Result:
    """Return what becomes of a job in a run of its own."""
    model = veneer.attach(tiny("llama"), veneer.LoRA(**kind.lora), seed=seed).to(dtype)
    given = rows(kind, seed=seed) | options
    events: list[Event] = []
    try:
        for event in veneer.train(
            model, given.pop("examples"), course(kind), directory=place, **given
        ):
            events.append(event)
    except veneer.TrainingError as error:
        events.append(Failed(error))
    return Result(events, weights_of(model, "default"))


def together(
    kinds: Mapping[str, Kind],
    place: Path | None = None,
    *,
    later: Mapping[str, Kind] | None = None,
    leave: Callable[[str, Event], bool] = lambda name, event: False,
    resume: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict[str, Result]:
    """Return what becomes of jobs over one model, up to the event at which `leave` is true.

    later: jobs that join one after another, after so many events.
    """
    model = tiny("llama")
    waiting = dict(later or {})
    events: dict[str, list[Event]] = {}

    def new(kinds: Mapping[str, Kind]) -> dict[str, Job]:
        jobs = {}
        for name, kind in kinds.items():
            veneer.attach(model, veneer.LoRA(**kind.lora), name=name, seed=seed)
            directory = None if place is None else place / name
            own = rows(kind, seed=seed)
            jobs[name] = Job(config=course(kind), directory=directory, resume=resume, **own)
            events[name] = []
        return jobs

    def joining() -> dict[str, Job]:
        if waiting and sum(map(len, events.values())) > 5 * len(events):
            name = next(iter(waiting))
            return new({name: waiting.pop(name)})
        return {}

    running = train_many(model, new(kinds), joining=joining, **options)
    ended: set[str] = set()
    for name, event in running:
        assert name not in ended
        if isinstance(event, Ended):  # which a run alone has no need to say
            ended.add(name)
            continue
        events[name].append(event)
        if leave(name, event):
            running.close()
            break
    else:
        assert ended == {n for n, seen in events.items() if not isinstance(seen[-1], Failed)}
    return {name: Result(events[name], weights_of(model, name)) for name in events}


# Twelve jobs: what an adapter can be, on rows of its own, each as long as it likes.
_MORE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rank": 16, "targets": "all"}, {"epochs": 4}),
    ({"rank": 2, "targets": "qv", "init": "pissa"}, {"schedule": "constant"}),
    ({"rank": 3, "targets": "mlp", "init": "olora"}, {"epochs": 1}),
    ({"rank": 4, "targets": "all", "init": "lora_ga"}, {"tokens_per_step": 25}),
    ({"rank": 1, "targets": ["embed_tokens", "all"]}, {"clip": 0, "warmup": 2}),
    ({"rank": 5, "targets": "attention", "dropout": 0.5, "alpha": 3}, {"epochs": 3}),
    ({"rank": 2, "targets": "lm_head", "rslora": True}, {"tokens_per_step": 60}),
    ({"rank": 3, "targets": "all", "dora": True, "dropout": 0.2}, {"seed": 3}),
]
TWELVE = KINDS | {
    f"more {number}": Kind(
        lora, (7 + number, 19, 4, 12 - number, 23), course, (8, 11)[: number % 3]
    )
    for number, (lora, course) in enumerate(_MORE)
}
