"""A run among others over the same model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from veneer.adapter.use import acting
from veneer.data.encode import Example
from veneer.fused.forward import Forward
from veneer.fused.head import Head
from veneer.fused.together import AdapterBatch
from veneer.models.device import RandomNumbers
from veneer.objectives.config import ANSWERS, Objective
from veneer.processes.world import ALONE
from veneer.training.begin import let_train
from veneer.training.config import TrainConfig
from veneer.training.events import Event, Notice
from veneer.training.many.schedule import Waiting
from veneer.training.one_of_several import OneOfSeveral
from veneer.training.ranking import SCORE_HEAD, begin_ranking, with_score
from veneer.training.run import Run
from veneer.training.step import StepToLearn, StepUnderWay

Events = Iterator[Event]


@dataclass(frozen=True, eq=False)
class Job:
    """What one run of several learns, and how: as the arguments of `train`.

    through: what is done with the run's events as they come, while its adapter acts; it passes all
    of them on. among: others, with which the run is compared.
    """

    examples: Sequence[Example]
    config: TrainConfig = field(default_factory=TrainConfig)
    objective: Objective = ANSWERS
    held_out: Sequence[Example] = ()
    directory: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    through: Callable[[Events], Events] | None = None
    among: OneOfSeveral | None = None


class RunningJob:
    """A job whose run has begun, and the step that is being made of it.

    name: of the job and of the adapter that it trains. What the run does by itself it does in a
    turn of its own, in which that adapter alone acts and torch's random numbers are the run's.
    """

    def __init__(self, name: str, job: Job, model: PreTrainedModel) -> None:
        self.name, self.job, self.model = name, job, model
        self.random = RandomNumbers(model.device)
        self.ended = False
        self.step: StepUnderWay | None = None
        self.next_batch = 0  # of that step
        self._events: Events = iter(())
        self.head: Head | None = None  # unless the model's own
        examples, held_out = job.examples, job.held_out
        with self.turn():
            if job.objective.is_ranking:
                examples, held_out = begin_ranking(model, examples, held_out, seed=job.config.seed)
                self.head = SCORE_HEAD
        let_train(model, name)
        with self.turn():
            self.run = Run(
                model,
                examples,
                job.config,
                held_out,
                job.directory,
                job.identity,
                ALONE,
                objective=job.objective,
                adapter=name,
                among=job.among,
            )

    def begin(
        self, forward: Forward, notices: Iterable[Event], should_stop: Callable[[], bool]
    ) -> None:
        """Make the run's events ready, of which the first are these notices."""
        events = self._course(forward, notices, should_stop)
        self._events = events if self.job.through is None else self.job.through(events)

    def _course(
        self, forward: Forward, notices: Iterable[Event], should_stop: Callable[[], bool]
    ) -> Events:
        try:
            if self.run.choices:
                yield Notice(self.run.choices)
            yield from notices
            self.model.eval()  # as for a run alone, whatever the others do
            forward = forward if self.head is None else with_score(forward)
            if forward.shares and not self.job.examples[0].second:  # as alone, to the bit
                forward = replace(forward, shares=False)
            yield from self.run.begin(forward, resume=self.job.resume)
            yield from self.run.go(forward, should_stop)
        finally:  # before the results are written
            self.run.state.optimizer.release()
            self.model.eval()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let this run's adapter act, and torch draw its random numbers."""
        with acting(self.model, self.name), self.random.drawn():
            yield

    def go_on(self) -> Events:
        """Yield the run's events until a step of it has batches to compute, or it has ended."""
        while self.step is None and not self.ended:
            try:
                with self.turn():
                    event = next(self._events, None)
            except Exception:
                self._events = iter(())  # has ended, and perhaps detached the adapter
                raise
            if event is None:
                self.ended = True
            elif isinstance(event, StepToLearn):
                self.step, self.next_batch = StepUnderWay.of(event, self.model), 0
            else:
                yield event

    @property
    def waiting(self) -> Waiting:
        """What the next pass may take of it."""
        assert self.step is not None
        batch, _ = self.step.batches[self.next_batch]
        return Waiting(len(batch.tokens), self.run.progress.step / self.run.steps)

    def take(self) -> AdapterBatch:
        """Return the batch that the next pass takes."""
        step = self.step
        assert step is not None
        batch, _ = step.batches[self.next_batch]
        self.next_batch += 1
        return AdapterBatch(
            *(self.name, batch, step.divisor, self.random),
            loss=partial(step.loss, batch=batch),
            token_loss=step.token_loss(batch),
            head=self.head,
        )

    def learnt(self) -> None:
        """Note that the batch that was taken last is learnt; the step's last one ends the step."""
        step = self.step
        assert step is not None
        if self.next_batch == len(step.batches):
            step.end(step.sums)
            self.step = None

    def end(self, error: Exception | None = None) -> None:
        """End the run where it is; `error` is what it fails by, which it notes."""
        if self.ended:
            return
        self.ended, self.step = True, None
        if isinstance(self._events, Generator):
            with self.turn(), suppress(Exception):
                if error is not None:
                    self._events.throw(error)
                self._events.close()
        self.run.state.optimizer.release()  # of a run that had not begun, too
