"""Training in several processes of this machine, and the same alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import veneer
from support.pairs import pairs
from support.random_adapters import examples, tokenizer, trained_weights, with_new_tokens
from support.tiny_models import VOCAB, quantized, tiny
from support.together import together
from veneer.adapter.layers import lora_layers
from veneer.fused import forward
from veneer.models import block_buffers
from veneer.models.sharded import shard_base
from veneer.objectives.config import ANSWERS, Objective
from veneer.processes.context import ContextGroup
from veneer.processes.world import World
from veneer.training import loop
from veneer.training.events import Evaluated, Event, Notice, Skipped, Step, Stopped, Trained

LENGTHS = [11, 7, 16, 9, 13, 8, 12, 10, 15, 6]
COURSE = veneer.TrainConfig(
    epochs=1, lr=0.01, tokens_per_step=40, tokens_per_batch=20, eval_every=2
)


@dataclass(frozen=True)
class Case:
    """A course of training, of a kind of `support.kinds` or what the other fields say.

    spoilt: what the loss of a process's pass is multiplied with.
    """

    kind: str | None = None
    architecture: str = "llama"
    bits: int | None = None
    what: veneer.LoRA | veneer.Method = field(default_factory=partial(veneer.LoRA, rank=3))
    new_tokens: bool = False
    course: Mapping[str, Any] = field(default_factory=dict)
    objective: Objective = ANSWERS
    dtype: torch.dtype = torch.float32
    wide: bool = False  # the same weights in float64; a model made in it would draw others
    padded: bool = False
    sharded: bool = False
    spoilt: Callable[[World, int], float] | None = None
    stop_at: int = 0  # the step after which the last process is asked to stop
    resumes: bool = False
    place: str | None = None  # of checkpoints

    @property
    def adds_tokens(self) -> bool:
        """Whether the rows may hold new tokens, for their embeddings to be learnt."""
        return self.new_tokens or (self.kind is not None and self._kind().new_tokens)

    def _kind(self) -> Any:
        from support.kinds import KINDS

        return next(kind for kind in KINDS if str(kind) == self.kind)

    def model(self, world: World) -> Any:
        """Return the model with what trains, the same each time."""
        model = self._narrow_model(world if self.sharded else World())
        if not self.wide:
            return model
        if any(name.endswith("experts") for name, _ in model.named_modules()):
            model.set_experts_implementation("eager")  # float64 has no grouped products
        return model.double()

    def rows(self) -> Any:
        """Return the rows that are learnt; those of a kind with an invocation have it."""
        if self.kind is not None and self._kind().invocation:
            return self._kind().rows(LENGTHS)
        if self.objective.shape == "pairs":
            return pairs(len(LENGTHS))
        return examples(LENGTHS, vocabulary=VOCAB + 3 * self.adds_tokens)

    def _narrow_model(self, world: World) -> Any:
        if self.kind is not None:
            kind = self._kind()
            return kind.attached(shard_base(kind.base(self.dtype), world))
        if self.bits:
            model = quantized(self.architecture, self.bits, dtype=self.dtype)
        else:
            model = tiny(self.architecture, dtype=self.dtype)
        shard_base(model, world)
        added = with_new_tokens(model, tokenizer()) if self.new_tokens else None
        veneer.attach(model, self.what, seed=0)
        for rows in added.parameters() if added else ():
            rows.requires_grad_(True)
        return model


@dataclass
class Result:
    """What a process has of a case: weights, losses, and events without times.

    changes: of adapters that start from a decomposition, what they add to each layer's weight. The
    factors themselves are of arbitrary sign there, so that those of other dtypes tell nothing.
    """

    weights: dict[str, Tensor]
    events: list[Event]
    sent: dict[str, int]
    error: str = ""
    changes: dict[str, Tensor] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    @property
    def losses(self) -> Tensor:
        values = [e.loss if isinstance(e, Step) else e.eval_loss for e in self.measured]
        return torch.tensor(values, dtype=torch.float64)

    @property
    def measured(self) -> list[Any]:
        return [event for event in self.events if isinstance(event, Step | Evaluated)]

    @property
    def flat(self) -> Tensor:
        return torch.cat([weight.flatten().double() for weight in self.weights.values()])

    @property
    def learnt(self) -> Tensor:
        """What is the same in each dtype, but for rounding."""
        learnt = self.changes or self.weights
        return torch.cat([weight.flatten().double() for weight in learnt.values()])


def trained(case: Case, world: World, place: Path) -> Result:
    """Train a case in this process of a world."""
    torch.manual_seed(world.rank)
    model = case.model(world)
    course = replace(COURSE, **case.course)
    rows = case.rows()
    own, passes, at = forward.Forward.losses, 0, [0]

    def spoilt(self: Any, model: Any, batch: Any, *more: Any) -> Tensor:
        nonlocal passes
        losses = own(self, model, batch, *more)
        if not model.training or case.spoilt is None:
            return losses
        passes += 1
        return losses * case.spoilt(world, passes)

    choose = loop.choose_forward

    def chosen(*args: Any, context: ContextGroup | None = None, **options: Any) -> Any:
        # Rows as short as these are cut too.
        context = None if context is None else replace(context, least=2)
        way, notices = choose(*args, context=context, **options)
        return replace(way, packed=False, layers=()) if case.padded else way, notices

    result = Result({}, [], {})
    forward.Forward.losses = spoilt  # type: ignore[method-assign]
    loop.choose_forward = chosen
    try:
        for event in veneer.train(
            model,
            rows,
            course,
            objective=case.objective,
            held_out=rows[2:5],  # learnt, so that the best weights are not those of the start
            directory=place / case.place if case.place else None,
            resume=case.resumes,
            should_stop=lambda: world.rank == world.size - 1 and at[0] == case.stop_at,
            world=world,
        ):
            at[0] = getattr(event, "step", at[0])
            if isinstance(event, Step):
                event = replace(event, seconds=0.0, rss_bytes=0)
            if isinstance(event, Step | Evaluated | Skipped | Stopped | Trained):
                result.events.append(event)
            elif isinstance(event, Notice):
                result.notices.append(event.text)
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}"
    finally:
        forward.Forward.losses = own  # type: ignore[method-assign]
        loop.choose_forward = choose
    result.weights = trained_weights(model)
    if isinstance(case.what, veneer.LoRA) and case.what.has_start:
        result.changes = {path: layer.delta() for path, layer in lora_layers(model)}
    result.sent = dict(world.sent.bytes_of)
    return result


def assert_learnt(result: Result, case: Case) -> None:
    """Assert that a result's weights are those after some step, and that each has changed."""
    last = result.events[-1]
    assert isinstance(last, Stopped) or (isinstance(last, Trained) and last.weights_of > 0), last
    start = trained_weights(case.model(World()))
    assert start.keys() == result.weights.keys()
    still = [name for name in start if torch.equal(start[name], result.weights[name])]
    assert not still, still


def _work(world: World, place: Path, cases: Mapping[str, Case]) -> None:
    block_buffers.SMALL = 100  # or little of so small bases would be sharded
    # Each with a world of its own, which counts what it sends.
    results = {name: trained(case, World.current(), place) for name, case in cases.items()}
    torch.save(results, place / f"results-{world.size}-{world.rank}.pt")


def trained_by(size: int, cases: Mapping[str, Case], place: Path) -> list[dict[str, Result]]:
    """Return the results of each process of `size`, by the cases' names."""
    together(_work, size, place, dict(cases))
    paths: Sequence[Path] = [place / f"results-{size}-{rank}.pt" for rank in range(size)]
    return [torch.load(path, weights_only=False) for path in paths]
