"""A run: its rows in their order, its state, and what is done after each of its steps."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapter.start import start_from_gradients
from veneer.adapter.use import in_use
from veneer.adapter.virtual_forward import virtual_input_count
from veneer.data.columns import lengths_of
from veneer.data.encode import Example
from veneer.data.packing import StepOrder, pack
from veneer.errors import TrainingError, joined
from veneer.formats.capture import capture
from veneer.fused.forward import Forward
from veneer.fused.recompute import Recompute
from veneer.kernels.transfer import has_queue
from veneer.objectives.config import ANSWERS, Objective
from veneer.objectives.criterion import MEAN_LOSS, Criterion
from veneer.processes.world import ALONE, World
from veneer.run_directory import checkpoint_steps
from veneer.training import checkpoint as checkpoints
from veneer.training.begin import (
    DEFAULT,
    as_default,
    check_objective,
    check_rows,
    check_same_run,
    check_types,
    choose_course,
    what_trains,
)
from veneer.training.checkpoint import Checkpoint
from veneer.training.config import CHANGEABLE, SCHEDULE, TrainConfig
from veneer.training.evaluate import Measurement, measure
from veneer.training.events import (
    Checkpointed,
    Doing,
    Evaluated,
    Event,
    Notice,
    Skipped,
    Started,
    Step,
    Stopped,
    Trained,
)
from veneer.training.lora_plus import lr_ratios
from veneer.training.memory import process_memory
from veneer.training.one_of_several import OneOfSeveral
from veneer.training.optimizer import FlatAdamW
from veneer.training.reference import criteria_over, preference_of
from veneer.training.state import Progress, RunState, changes_of
from veneer.training.step import StepToLearn, counts_of, seed_of
from veneer.training.teacher import identity_of_teacher
from veneer.training.threads import worthwhile_threads
from veneer.training.watch import Watch


def reads_late(device: torch.device) -> bool:
    """Return whether a step is read while the next one is computed."""
    return has_queue(device)


@dataclass(frozen=True)
class Begun:
    """A step that was begun at `start`: its number and rows, and what is learnt in it."""

    number: int
    rows: list[int]
    start: float
    asked: StepToLearn


class Run:
    """A run's settings, its rows in their order, and its state.

    Its steps are computed by others, which are asked for them: by `train`, for a run alone, or
    together with the steps of other runs over the same model. Whatever a run does, the adapter that
    it trains acts, and torch's random numbers are its own.

    adapter: the name under which that is attached, where the run's checkpoints are to be those of a
    run alone, in which it is called "default". among: others, with which the run is compared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        examples: Sequence[Example],
        config: TrainConfig,
        held_out: Sequence[Example],
        directory: Path | None,
        identity: Mapping[str, Any],
        world: World,
        *,
        objective: Objective = ANSWERS,
        adapter: str = DEFAULT,
        among: OneOfSeveral | None = None,
    ) -> None:
        for rows in (examples, held_out):
            check_types(model, rows)
        weights, active = what_trains(model, adapter)
        check_rows(examples, held_out)
        check_objective(objective, config, [*examples[:1], *held_out[:1]])
        config, self.choices, self.usual_lr = choose_course(
            model, examples, config, share_of_rate=objective.share_of_rate
        )
        self.watch = Watch(model, examples, config, directory, world, usual_lr=self.usual_lr)
        self.objective, self.among = objective, among or OneOfSeveral()
        # Until `begin`, which measures what the reference gives.
        self.criterion: Criterion = MEAN_LOSS
        self.held_out_criterion: Criterion = MEAN_LOSS
        assert config.lr is not None
        assert config.tokens_per_step is not None
        self.model, self.examples, self.config = model, examples, config
        self.held_out, self.directory, self.world = held_out, directory, world
        self.identity = config.course | objective.course | dict(identity)
        self.identity |= identity_of_teacher(objective, model, world)
        self.last_end = 0.0  # when the last step's event was made
        self.saved: list[int] = []  # the steps of this run's checkpoints, as far as they are whole
        self.going_on: list[str] = []  # what is to be known of a run that goes on
        lengths = lengths_of(examples)
        self.order = StepOrder(
            lengths,
            config.tokens_per_step,
            config.batch_tokens,
            config.seed,
            virtual_input_count(model),
        )
        self.steps_of_epoch = self.order.epoch(0)
        self.steps = config.steps or self.order.steps(config.epochs or 0)
        torch.manual_seed(config.seed)
        ratio = config.lora_plus_ratio
        ratios = {}
        if ratio is not None:
            for name, times in lr_ratios(model, ratio=ratio, lr=config.lr).items():
                ratios[as_default(name, adapter)] = times
        # Last, for until it is released the weights are views of its buffers.
        optimizer = FlatAdamW(
            weights,
            lr=config.lr,
            weight_decay=config.weight_decay,
            ratios=ratios,
            optimizer=config.optimizer,
        )
        self.state = RunState(weights, active, optimizer)
        check_same_run(world, self.identity, lengths)

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return self.state.progress

    def begin(self, forward: Forward, *, resume: bool) -> Iterator[Event]:
        """Go back to the newest checkpoint, if that is asked for and there is one, or start."""
        yield from self._take_objective(forward)
        restored = resume and self.restore()
        if resume and not restored:
            yield Notice(f"There is no checkpoint in {self.directory} to go on from; a new start.")
        if not restored:
            self._start_from_gradients(forward)
        self.state.replicate(self.world)
        yield from map(Notice, self.going_on)

    def _start_from_gradients(self, forward: Forward) -> None:
        """Give the adapters their start that take it from the gradient of the first batch."""
        # By the layers' own forward, which knows whole layers to compute again, or nothing.
        recompute: Recompute = "none" if forward.recompute == "none" else "full"
        plain = replace(forward, layers=(), recompute=recompute)
        first = pack(self.examples, self.steps_of_epoch[self.progress.step_in_epoch][0])
        add_up = None if forward.context is None else forward.context.add_up
        counts = counts_of(self.criterion, [(first, True)], ALONE)
        token_loss = self.criterion.token_loss(first, self.model.device)

        def loss() -> Tensor:
            losses = plain.losses(self.model, first, token_loss)
            return self.criterion(losses, first, counts).loss

        start_from_gradients(self.model, loss, add_up=add_up)

    def _take_objective(self, forward: Forward) -> Iterator[Event]:
        """Make the objective one over these rows, which its reference measures, if it has one."""
        if self.objective.asks is not None:
            yield Doing(self.objective.asks)
        splits = {"train": self.examples, "valid": self.held_out}
        self.criterion, self.held_out_criterion = criteria_over(
            *(self.objective, splits, self.model, forward),
            identity=self.identity,
            world=self.world,
            tokens_per_batch=self.config.batch_tokens,
        )
        if text := preference_of(self.criterion):
            yield Notice(text)

    def go(self, forward: Forward, should_stop: Callable[[], bool]) -> Iterator[Event]:
        """Yield the events of all steps that are left, and ask for each of these steps."""
        config, progress, state = self.config, self.progress, self.state
        self.watch.forward = forward
        yield Started(self.steps, progress.step)
        if self.held_out and progress.step == 0:
            yield self._evaluate(forward)
        under_way: deque[Begun] = deque()
        # A device with a queue computes a step while the host makes the next one ready.
        most = 1 if reads_late(self.model.device) else 0
        while progress.step < self.steps:
            if self._out_of_patience():
                yield Stopped(progress.step, "patience")
                break
            step = self._step()
            yield step.asked
            under_way.append(step)
            at_end = progress.step == self.steps or progress.step_in_epoch == 0
            evaluates = self.held_out and (
                at_end
                or _is_due(progress.step, config.eval_every)
                or self.among.evaluates(progress.step, self.steps)
            )
            is_due = at_end or _is_due(progress.step, config.save_every)
            pauses = evaluates or (is_due if self.directory else progress.step == self.steps)
            while len(under_way) > (0 if pauses else most):
                yield from self._ended(under_way.popleft())
            if evaluates:
                yield self._evaluate(forward)
            stopping = self.world.any(should_stop())
            while stopping and under_way:
                yield from self._ended(under_way.popleft())
            must = stopping or self._out_of_patience() or progress.step == self.steps
            # Between skipped steps the checkpoint before them is the better one to go back to.
            due = not progress.skips and is_due
            due = due or must or self._is_kept(progress.step)
            if self.directory and due and self.among.saves():
                yield self._save(self.directory)
            if stopping and progress.step < self.steps:
                yield Stopped(progress.step, "interrupted")
                return
        self.watch.check_base(all=True)
        if state.best_weights is not None and progress.best_step != progress.step:
            state.take_weights(state.best_weights)
            yield Trained(progress.step, progress.best_step)
        else:
            yield Trained(progress.step, progress.step)

    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def _is_kept(self, step: int) -> bool:
        """Return whether a step's checkpoint is to stay as one of the best."""
        return any(step == best for _, best in self.progress.best)

    def _step(self) -> Begun:
        """Go to the next step, and return what it is to learn."""
        start = time.perf_counter()
        progress, config = self.progress, self.config
        batches = self.steps_of_epoch[progress.step_in_epoch]
        self._advance()
        lr = config.lr_at(progress.step, self.steps)
        if self.world.size > 1:
            torch.manual_seed(seed_of(config.seed, progress.step, self.world.rank))
        asked = StepToLearn(
            self.examples,
            batches,
            self.state.optimizer,
            self.order,
            lr,
            config.clip,
            self.criterion,
            self.watch.most_to_learn(progress),
        )
        return Begun(progress.step, list(chain.from_iterable(batches)), start, asked)

    def _ended(self, step: Begun) -> Iterator[Event]:
        """Yield what became of a step, and what there is to say of it."""
        yield self._end(step)
        yield from map(Notice, self.watch.unsaid)
        self.watch.unsaid.clear()

    def _end(self, step: Begun) -> Step | Skipped:
        """Return what became of a step."""
        learnt = step.asked.learning.wait()
        now = time.perf_counter()
        # While the step before it was computed, this one waited.
        seconds, self.last_end = now - max(step.start, self.last_end), now
        left_out = self.watch.step(self.state, step.number, step.rows, learnt, step.asked.most)
        if left_out is not None:
            return left_out
        tokens = sum(int(self.order.lengths[row]) for row in step.rows)
        memory = process_memory("VmRSS")
        lr, labels = step.asked.lr, learnt.label_tokens
        return Step(step.number, learnt.loss, lr, tokens, labels, seconds, memory, learnt.metrics)

    def _advance(self) -> None:
        """Go to the next step, and at the end of an epoch to the next epoch."""
        progress = self.progress
        progress.step += 1
        progress.step_in_epoch += 1
        if not self.steps_of_epoch.has(progress.step_in_epoch):
            progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
            self.steps_of_epoch = self.order.epoch(progress.epoch)

    def _evaluate(self, forward: Forward) -> Evaluated:
        """Measure the held-out rows, and keep the weights if none were better so far."""
        progress, now = self.progress, partial(self._measure, forward)
        measured = now() if progress.step else self.among.measure_start(now)
        loss = measured.loss
        is_best = loss < progress.best_loss
        if is_best:
            progress.best_loss, progress.best_step = loss, progress.step
            self.state.best_weights = self.state.copy_of_weights()
        if self.config.keep_best and progress.step and math.isfinite(loss):
            best = sorted([*progress.best, [loss, progress.step]])
            progress.best = best[: self.config.keep_best]
        progress.evaluations_since_best = 0 if is_best else progress.evaluations_since_best + 1
        return Evaluated(progress.step, loss, measured.perplexity, is_best, measured.metrics)

    def _measure(self, forward: Forward) -> Measurement:
        """Return what the held-out rows come to."""
        with worthwhile_threads(self.model):
            return measure(
                self.model,
                self.held_out,
                forward,
                criterion=self.held_out_criterion,
                tokens_per_batch=self.config.batch_tokens,
                world=self.world,
            )

    def _save(self, directory: Path) -> Checkpointed:
        """Write a checkpoint in one process; only it and those of the best weights stay."""
        self.watch.check_base()
        place = self.world.first(lambda: self._write_checkpoint(directory))
        return Checkpointed(self.progress.step, place)

    def _write_checkpoint(self, directory: Path) -> Path:
        state, progress = self.state, self.progress
        keep = {progress.best_step, *(int(step) for _, step in progress.best)}
        self.saved = [*(step for step in self.saved if step < progress.step), progress.step]
        keep |= {*self.saved[-self.config.keep :]}
        one = len(in_use(self.model)) == 1
        adapter = capture(self.model, copy=False) if one else None
        checkpoint = state.to_checkpoint(self.identity, self.steps, adapter)
        return checkpoints.write(checkpoint, directory, keep=keep)

    def restore(self) -> bool:
        """Go back to where the newest checkpoint was, and return whether there is one. One process
        reads it: the others may be on machines that do not have it."""
        directory = self.directory
        if directory is None:
            return False
        checkpoint = self.world.first(lambda: checkpoints.newest(directory))
        if checkpoint is None:
            return False
        if differing := self.state.differences_from(checkpoint, self.identity):
            raise TrainingError(
                f"The checkpoint in {self.directory} belongs to another run: {joined(differing)}. "
                f"Only {', '.join(CHANGEABLE)} may be others. Resume with that run's settings, or "
                "start anew: elsewhere by another --out (and --from its adapter), or by --force."
            )
        lost = [f"{why} Going on from an older checkpoint." for why in checkpoint.passed_over]
        self.going_on = [*lost, *filter(None, [self._other_schedule(checkpoint)])]
        if self.world.writes:
            steps = sorted(checkpoint_steps(directory))
            self.saved = [step for step in steps if step <= checkpoint.step]
        self.state.restore(checkpoint)
        self.steps_of_epoch = self.order.epoch(self.progress.epoch)
        return True

    def _other_schedule(self, checkpoint: Checkpoint) -> str:
        """Return what is other than when the run began, for a person; nothing where it is the same.

        Raises TrainingError where no step would be left.
        """
        before, now = checkpoint.identity, self.identity
        changed = [key for key in CHANGEABLE if before.get(key) != now.get(key)]
        changes = ", ".join(changes_of(changed, before, now))
        if changed and checkpoint.step >= self.steps:
            raise TrainingError(
                f"With {changes} the run in {self.directory} ends at step {self.steps}, and it has "
                f"made {checkpoint.step}. Ask for more epochs or steps, or replace it by --force."
            )
        follows = "; the learning rate follows the new schedule" if {*changed} & SCHEDULE else ""
        step = f"step {checkpoint.step + 1} of {self.steps}"
        return changes and f"Going on from {step} with {changes}{follows}."


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
