"""The training loop: it yields what happens and prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from veneer.data.encode import Example
from veneer.fused.forward import Forward, choose_forward
from veneer.kernels.graphs import notice_of
from veneer.kernels.heap import kept_heap
from veneer.objectives.config import ANSWERS, Objective
from veneer.processes.context import ContextGroup
from veneer.processes.world import World
from veneer.training.config import TrainConfig
from veneer.training.events import Event, Notice
from veneer.training.frozen import FrozenBase
from veneer.training.ranking import begin_ranking, with_score
from veneer.training.recorded import RecordedPasses
from veneer.training.run import Run
from veneer.training.step import StepToLearn, learn
from veneer.training.threads import worthwhile_threads


def train(
    model: PreTrainedModel,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    objective: Objective = ANSWERS,
    held_out: Sequence[Example] = (),
    directory: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    world: World | None = None,
) -> Iterator[Event]:
    """Train whatever of `model` requires a gradient on `examples`, and yield events.

    With a `directory`, checkpoints go there, and `resume` goes on from the newest, to the bit, or
    along another schedule where that is asked for. It must have the same `identity`: what else
    decides the run's course. With `held_out` examples the model ends with the weights that were
    best on them, otherwise with the last. The run ends after the step at which `should_stop`
    returns True. On a GPU the event of a step may come when the next one has begun, but before
    anything is measured or saved.

    objective: what is learnt by. For others than answers, the examples are pairs or judged answers,
    as `load_examples(..., shape=objective.shape)` makes them. A reward model's head is attached.

    world: the processes that train together, all with the same model, examples and config; those of
    torch.distributed unless given. Each yields the same events; one of them writes checkpoints.

    Raises DivergedError after three steps in a row without a finite loss; TrainingError where a
    checkpoint does not belong to this run; DataError where there is nothing to learn from;
    ConfigError where processes cannot share the rows of this model (`context_parallel`).
    """
    world = World.current() if world is None else world
    if objective.is_ranking:
        examples, held_out = begin_ranking(model, examples, held_out, seed=config.seed)
    run = Run(
        *(model, examples, config, held_out, directory, identity or {}, world), objective=objective
    )
    try:
        with kept_heap():
            forward, notices = choose_forward(
                model,
                examples,
                recompute=config.recompute,
                directory=directory,
                context=ContextGroup.of(world, config.context_parallel),
            )
            forward = with_score(forward) if objective.is_ranking else forward
            yield from map(Notice, [*([run.choices] if run.choices else []), *notices])
            yield from run.begin(forward, resume=resume)
            run.watch.frozen_base = FrozenBase(model)
            model.train()
            with forward.installed(model):
                yield from _alone(run, forward, should_stop)
    finally:
        run.state.optimizer.release()
        model.eval()


def _alone(run: Run, forward: Forward, should_stop: Callable[[], bool]) -> Iterator[Event]:
    """Yield the events of a run, and compute its steps one after another."""
    model, config = run.model, run.config
    passes: RecordedPasses | None = None
    replays = config.replay_passes
    for event in run.go(forward, should_stop):
        if not isinstance(event, StepToLearn):
            yield event
            continue
        if replays and run.world.size > 1:
            yield Notice(notice_of("several processes train together"))
        elif replays:
            tokens, gradients = config.batch_tokens, run.state.optimizer.gradients
            passes = RecordedPasses(model, forward, gradients, tokens_per_batch=tokens)
        replays = False
        with worthwhile_threads(model):
            learn(model, forward, event, world=run.world, passes=passes)
        if passes is not None and (why := passes.notice()):
            yield Notice(why)
