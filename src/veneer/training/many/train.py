"""Train several adapters over one base at a time, in passes that they share."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedModel

from veneer.adapter.beside import why_alone_of
from veneer.adapter.parameters import experts_of
from veneer.adapter.use import acting, in_use
from veneer.errors import ConfigError, VeneerError, joined
from veneer.fused.forward import Forward, choose_forward
from veneer.fused.shared_prompts import notices_of
from veneer.fused.together import backward_together, kind_of, why_alone
from veneer.kernels.heap import kept_heap
from veneer.processes.world import World
from veneer.training.begin import let_train
from veneer.training.config import TOKENS_PER_PASS
from veneer.training.events import Ended, Event, Failed, Notice
from veneer.training.frozen import FrozenBase
from veneer.training.many.running import Job, RunningJob
from veneer.training.many.schedule import check_limit, choose
from veneer.training.threads import worthwhile_threads

log = logging.getLogger("veneer.training")


def train_many(
    model: PreTrainedModel,
    jobs: Mapping[str, Job],
    *,
    tokens_per_pass: int = TOKENS_PER_PASS,
    joining: Callable[[], Mapping[str, Job]] = dict,
    should_stop: Callable[[str], bool] = lambda name: False,
) -> Iterator[tuple[str, Event]]:
    """Train several attached adapters at a time, each as `train` would by itself, and yield each
    event with the name of its job; the last of one that does not fail is Ended.

    jobs: by the names of the adapters that they train. A pass over the base takes the next batches
    of several jobs, of `tokens_per_pass` tokens in all unless one of them alone has more. Each job
    has its own steps, optimizer, random numbers and end: its losses and weights are those of a run
    of its own but for rounding, whatever becomes of the others. `joining` is asked before each pass
    for jobs that begin now, whose adapters are attached by then; a job ends after the step at which
    `should_stop` returns True for its name. Of one that fails the last event is Failed, and the
    others go on. At the end the adapters hold what they have learnt, and those act that did before.

    Raises, before the first step, what `train` raises of any of `jobs`; ConfigError for settings
    with which passes cannot be shared; AdapterError for a name that is not attached.
    """
    before = in_use(model)
    running: list[RunningJob] = []
    passes: _Passes | None = None
    new = dict(jobs)
    try:
        with kept_heap(), acting(model, before), ExitStack() as installed:
            check_limit(tokens_per_pass)
            _check(new.values())
            frozen_base = FrozenBase(model)  # which all of them share
            while new or running:
                begun: list[RunningJob] = []
                for name, job in new.items():
                    try:
                        if any(each.name == name for each in running):
                            raise ConfigError(f"{name} is a job that trains already.")
                        _check([job, *(each.job for each in running)])
                        running.append(RunningJob(name, job, model))
                        running[-1].run.watch.frozen_base = frozen_base
                        begun.append(running[-1])
                    except VeneerError as error:
                        if passes is None:
                            raise
                        yield name, Failed(error)
                if new:
                    for each in running:
                        let_train(model, each.name)  # attaching one freezes the others
                if begun:
                    installed.close()
                    passes = _Passes.of(running, begun[0], passes)
                    installed.enter_context(passes.forward.installed(model))
                    for each in begun:
                        notices = passes.notices(each)
                        each.begin(passes.forward, notices, partial(should_stop, each.name))
                for each in running:
                    yield from _until_a_step(each)
                running = [each for each in running if not each.ended]
                if running:
                    assert passes is not None
                    yield from passes.make(running, tokens_per_pass)
                running = [each for each in running if not each.ended]
                new = dict(joining())
    finally:
        for each in running:
            each.end()
        model.eval()


def _check(jobs: Iterable[Job]) -> None:
    """Raise ConfigError for jobs whose passes cannot be shared."""
    configs = [job.config for job in jobs]
    problems = []
    if World.current().size > 1:
        problems.append("several jobs train in one process; start one alone")
    if len(ways := {config.recompute for config in configs}) > 1:
        problems.append(f"recompute must be the same for all, and is {' and '.join(sorted(ways))}")
    if any(config.context_parallel > 1 for config in configs):
        problems.append("context_parallel must be 1")
    if any(config.replay_passes for config in configs):
        problems.append("replay_passes is for a job alone")
    if problems:
        raise ConfigError(f"These jobs cannot train together: {joined(problems)}.")


def _kind(job: RunningJob) -> Hashable:
    """Return what decides which functions compute a job's passes."""
    own = job.job
    return kind_of(job.model, job.name), bool(own.examples[0].second), own.config.recompute


def _until_a_step(job: RunningJob) -> Iterator[tuple[str, Event]]:
    """Yield a job's events until it has a step to learn, or has ended, be it by an error."""
    try:
        for event in job.go_on():
            yield job.name, event
        if job.ended:
            yield job.name, Ended()
    except Exception as error:
        yield _failed(job, error)


def _failed(job: RunningJob, error: Exception) -> tuple[str, Event]:
    """End a job by an error, be it for want of memory: the others go on."""
    if not isinstance(error, VeneerError | OSError):
        log.exception("%s failed by an error that nobody expected.", job.name)
    job.end(error)
    return job.name, Failed(error)


@dataclass(frozen=True, eq=False)
class _Passes:
    """How passes are computed, until a job begins that the proof of it does not cover; `alone`: by
    the names of jobs whose batches share none, why; `tried`: how many jobs of each kind were there
    for the proof, which tries two of each, or none where they cannot share."""

    model: PreTrainedModel
    forward: Forward
    remarks: Sequence[str]
    alone: Mapping[str, str]
    tried: Counter[Hashable]

    @classmethod
    def of(
        cls, running: Sequence[RunningJob], begun: RunningJob, before: _Passes | None
    ) -> _Passes:
        """Return how passes are computed for these jobs; `begun` is one that is new."""
        model, kinds = begun.model, Counter(map(_kind, running))
        why_own = {each.name: why_alone_of(model, each.name) for each in running}
        own = {name: why for name, why in why_own.items() if why}
        if before is not None and all(min(n, 2) <= before.tried[kind] for kind, n in kinds.items()):
            forward = before.forward
            # Attaching the first adapter of stacks of experts puts other modules there.
            experts = tuple(module for _, module, why in experts_of(model) if why is None)
            if experts != forward.experts:
                forward = replace(forward, experts=experts)
            return replace(before, forward=forward, alone=own)
        of_jobs = [each.job.examples for each in (begun, *running)]
        rows = next((rows for rows in of_jobs if rows[0].second), of_jobs[0])  # pairs share prompts
        with begun.turn():
            forward, remarks = choose_forward(
                model, rows, recompute=begun.run.config.recompute, directory=begun.job.directory
            )
        if before is not None and before.forward.recompute == forward.recompute:
            forward = replace(forward, arena=before.forward.arena)  # whose memory is there already
        if rows[0].second:  # of which other jobs have others, or none
            of_these = notices_of(rows, forward.unshared)
            remarks = [each for each in remarks if each not in of_these]
        alone = why_alone(forward, model, [each.name for each in running], rows)
        # Where jobs cannot share, the cause may be one that is gone when the next begins.
        return cls(model, forward, remarks, alone, kinds if alone == own else Counter())

    def notices(self, each: RunningJob) -> list[Notice]:
        """Return what is to be known of the passes of a job."""
        rows, why = each.run.examples, self.alone.get(each.name)
        of_rows = notices_of(rows, self.forward.unshared) if rows[0].second else []
        alone = [f"Its steps have passes of their own: {why}."] if why else []
        return [Notice(text) for text in (*self.remarks, *of_rows, *alone)]

    def make(self, running: Sequence[RunningJob], tokens: int) -> Iterator[tuple[str, Event]]:
        """Compute one pass for as many jobs as share it, of at most so many tokens, and let those
        learn whose steps it ends. An error of a pass that several share is one of all."""
        model = self.model
        if not model.training:
            model.train()
        chosen = [running[n] for n in choose([each.waiting for each in running], tokens)]
        sharing = [each for each in chosen if each.name not in self.alone]
        apart = [[each] for each in chosen if each.name in self.alone]
        for together in ([sharing] if sharing else []) + apart:
            batches = [each.take() for each in together]
            try:
                with worthwhile_threads(model):
                    backward_together(self.forward, model, batches, alone=self.alone)
                    for each in together:
                        each.learnt()
            except Exception as error:
                if len(together) > 1:
                    for each in running:
                        each.end(error)
                    raise
                yield _failed(together[0], error)
