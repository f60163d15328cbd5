"""A run on the model's own samples: each step draws them, and learns by what rewards say of them,
or by what a teacher gives their tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.active import active_adapters_of
from veneer.adapter.config import LoRA
from veneer.adapter.new_tokens import new_tokens_of
from veneer.adapter.use import in_use
from veneer.data.encode import Example
from veneer.data.packing import StepOrder
from veneer.errors import ConfigError
from veneer.fused.forward import Forward, choose_forward
from veneer.generate.samples import SampleDecoder, rows_drawn
from veneer.kernels.heap import kept_heap
from veneer.models.context import own_context
from veneer.models.end_tokens import end_tokens
from veneer.objectives.config import Objective
from veneer.objectives.on_policy import PolicyCriterion
from veneer.objectives.policy_config import OnPolicy
from veneer.objectives.samples import OverSamples
from veneer.objectives.taught_samples import TaughtSamples
from veneer.processes.world import ALONE
from veneer.rewards.judged import Judged, Weighted
from veneer.run_directory import RunDirectory
from veneer.training.config import TrainConfig
from veneer.training.evaluate import Measurement, measure
from veneer.training.events import Event, Notice, Skipped, Step
from veneer.training.frozen import FrozenBase
from veneer.training.live_teacher import LiveTeacher, teaching
from veneer.training.on_policy.page import SampleLog
from veneer.training.on_policy.passes import passes_of
from veneer.training.on_policy.prompts import Prompts
from veneer.training.on_policy.rollout import Roller, Rollout, base_log_probabilities
from veneer.training.run import Begun, Run
from veneer.training.step import Learning, StepToLearn, learn
from veneer.training.teacher import DIGEST
from veneer.training.threads import worthwhile_threads

STEPS = 100  # of a run, unless it is given steps or epochs
TOKENS_PER_PASS = 2048  # of samples in a forward and backward pass, unless given
LONGEST_CONTEXT = 4096  # of a prompt with its answer, where the model's own is longer


def train_on_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    config: TrainConfig,
    *,
    objective: Objective,
    on_policy: OnPolicy,
    rewards: Sequence[Weighted],
    held_out: Prompts | None = None,
    directory: RunDirectory | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train the adapter that acts on its own answers to prompts, and yield events.

    Each step draws `group_size` answers to each of `prompts_per_step` prompts, and learns by how
    much each is better than the others, or how far from the objective's teacher. Answers to
    `held_out` are measured as often as `train` evaluates. With a `directory`, checkpoints and
    samples go there.
    Raises as `train` does, TrainingError where a reward fails and the run is to stop then, and
    `check_teacher`'s errors for what cannot teach.
    """
    _check(model, config)
    if objective.teacher is None and on_policy.group_size < 2:
        raise ConfigError("Rewards compare answers to one prompt: take a group_size of 2 or more.")
    with ExitStack() as beside:
        teacher = None
        if objective.teacher is not None:
            teacher = beside.enter_context(
                teaching(objective.teacher, model, tokenizer, prompts.examples)
            )
        run = OnPolicyRun(
            *(model, tokenizer, prompts, config),
            objective=objective,
            on_policy=on_policy,
            rewards=rewards,
            teacher=teacher,
            held_out=held_out,
            directory=directory,
            identity=identity or {},
        )
        yield from _events(run, resume=resume, should_stop=should_stop)


def _events(run: OnPolicyRun, *, resume: bool, should_stop: Callable[[], bool]) -> Iterator[Event]:
    """Yield the events of a run from its beginning to its end."""
    model, prompts = run.model, run.prompts
    try:
        with kept_heap():
            forward, notices = choose_forward(
                *(model, prompts.examples),
                recompute=run.config.recompute,
                directory=run.directory,
                answer_one_prompt=True,
            )
            of_teacher = () if run.teacher is None else run.teacher.notices
            yield from map(Notice, [run.course, *notices, *of_teacher])
            yield from run.begin(forward, resume=resume)
            yield from map(Notice, run.make_decoder())
            run.watch.frozen_base = FrozenBase(model)
            model.train()
            with forward.installed(model):
                for event in run.go(forward, should_stop):
                    if isinstance(event, StepToLearn):
                        run.learn(forward, event)
                    else:
                        yield event
                    yield from run.take_notices()
    finally:
        run.state.optimizer.release()
        model.eval()
        run.log.end()


def _check(model: PreTrainedModel, config: TrainConfig) -> None:
    """Raise ConfigError for what cannot be trained on samples."""
    active = active_adapters_of(model)
    names = list(in_use(model))
    adapter = active.configs[names[0]] if len(names) == 1 else None
    problems = []
    if not isinstance(adapter, LoRA):
        problems.append("one adapter of low rank has to act, as samples are drawn with it")
    elif adapter.invocation is not None:
        problems.append("an adapter that acts from an invocation on draws no samples yet")
    elif beside := sorted(active.modules_to_save.get(names[0], {})):
        problems.append(f"the adapter replaces weights that rows of a batch share ({beside[0]})")
    if new_tokens_of(model) is not None:
        problems.append("prompts and samples have no new tokens yet, and the model has some")
    if config.context_parallel > 1 or config.replay_passes:
        problems.append("context_parallel and replay_passes are for answers that are given")
    if config.on_spike != "warn":
        problems.append(
            f"on_spike {config.on_spike} is for answers that are given, as the losses of samples "
            "differ from step to step"
        )
    if problems:
        raise ConfigError(f"This run on samples cannot be: {'; '.join(problems)}.")


class OnPolicyRun(Run):
    """A run whose rows are prompts. What it learns from is drawn anew for each step, from the
    weights as they are and random numbers of the step's own, so that a resumed run draws the same.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        config: TrainConfig,
        *,
        objective: Objective,
        on_policy: OnPolicy,
        rewards: Sequence[Weighted],
        teacher: LiveTeacher | None,
        held_out: Prompts | None,
        directory: RunDirectory | None,
        identity: Mapping[str, Any],
    ) -> None:
        if teacher is not None:
            identity = {DIGEST: teacher.digest, **identity}
        super().__init__(
            *(model, prompts.examples, course_of(config), held_out.examples if held_out else ()),
            None if directory is None else directory.checkpoints,
            on_policy.course | dict(identity),
            ALONE,
            objective=objective,
        )
        self.watch.detects_spikes = False  # what a policy loses differs from sample to sample
        self.tokenizer, self.prompts, self.rewards = tokenizer, prompts, rewards
        self.teacher = teacher
        self.to_evaluate = held_out
        self.on_policy = on_policy
        self.of_answers = objective.objective == "rloo"
        count = on_policy.prompts_per_step
        self.order = StepOrder([1] * len(prompts.examples), count, count, self.config.seed)
        self.steps_of_epoch = self.order.epoch(0)
        self.steps = self.config.steps or self.order.steps(self.config.epochs or 0)
        self.course = (
            f"{self.steps} steps of at most {count} prompts, with {on_policy.group_size} answers "
            f"to each, at a learning rate of {self.config.lr:g}."
        )
        self.log = SampleLog(directory)
        self.roller: Roller | None = None
        self._rollouts: dict[int, tuple[Rollout, OverSamples]] = {}
        self._notices: list[str] = []
        self._faulty: set[str] = set()

    def make_decoder(self) -> tuple[str, ...]:
        """Make what draws the samples, and return notices. The run is where it begins."""
        model, config = self.model, self.on_policy
        asked = [*self.examples, *self.held_out]
        longest = max(len(example.tokens) for example in asked) + config.max_new_tokens
        decoder = SampleDecoder(
            model,
            {*end_tokens(model), self.tokenizer.eos_token_id} - {None},
            context=min(longest, context_of(model.config)),
            rows=max(rows_drawn(config.group_size), config.eval_answers),
        )
        self.roller = Roller(
            *(decoder, self.tokenizer, self.prompts, self.rewards, config),
            of_answers=self.of_answers,
            seed=self.config.seed,
        )
        self.log.begin(self.progress.step)
        return decoder.notices

    def learn(self, forward: Forward, asked: StepToLearn) -> None:
        """Make a step's updates."""
        with worthwhile_threads(self.model):
            learnings: list[Learning] = []
            for _ in range(self.on_policy.updates):
                update = replace(asked, _answer=[])
                learn(self.model, forward, update, world=self.world)
                learnings.append(update.learning)
        asked.learnt(replace(learnings[-1], before=learnings[:-1]))

    def take_notices(self) -> Iterator[Notice]:
        """Yield what a person should know since the last time."""
        notices, self._notices = self._notices, []
        yield from map(Notice, notices)

    def _take_objective(self, forward: Forward) -> Iterator[Event]:
        self.forward = forward
        return iter(())

    def _step(self) -> Begun:
        """Go to the next step, draw its samples, and return what it is to learn."""
        assert self.roller is not None
        start = time.perf_counter()
        progress = self.progress
        (rows,) = self.steps_of_epoch[progress.step_in_epoch]
        self._advance()
        lr = self.config.lr_at(progress.step, self.steps)
        rollout = self.roller.roll(progress.step, rows, self._reference)
        self._note_faults(rollout.judged, "this step")
        self.log.add(rollout.lines)
        order, batches = self._batches(rollout.examples)
        criterion = self._criterion_of(rollout)
        self._rollouts[progress.step] = rollout, criterion
        optimizer, clip = self.state.optimizer, self.config.clip
        asked = StepToLearn(rollout.examples, batches, optimizer, order, lr, clip, criterion)
        return Begun(progress.step, rows, start, asked)

    def _criterion_of(self, rollout: Rollout) -> OverSamples:
        """Return what is learnt of samples."""
        if self.teacher is None:
            return PolicyCriterion(self.on_policy, rollout.drawn, self.of_answers)
        gives = partial(self.teacher.on, self.forward)
        return TaughtSamples(self.objective, gives, rollout.drawn.sampled)

    def _batches(self, examples: Sequence[Example]) -> tuple[StepOrder, list[list[int]]]:
        """Return the passes in which samples are computed."""
        return passes_of(
            examples,
            group=self.on_policy.group_size if self.forward.shares else 1,
            tokens_per_batch=self.config.batch_tokens,
            seed=self.config.seed,
        )

    def _measure(self, forward: Forward) -> Measurement:
        assert self.roller is not None
        assert self.to_evaluate is not None
        with worthwhile_threads(self.model):
            rollout = self.roller.held_out(self.to_evaluate)
            if self.teacher is not None:
                measured = measure(
                    *(self.model, rollout.examples, forward),
                    criterion=self._criterion_of(rollout),
                    tokens_per_batch=self.config.batch_tokens,
                )
                return replace(measured, metrics={**rollout.metrics, **measured.metrics})
        self._note_faults(rollout.judged, "this evaluation")
        # With its sign turned, as the least is best.
        return Measurement(-rollout.metrics.get("reward", math.nan), rollout.metrics)

    def _reference(self, examples: Sequence[Example]) -> list[list[float]]:
        with worthwhile_threads(self.model):
            _, batches = self._batches(examples)
            return base_log_probabilities(self.model, self.forward, examples, batches)

    def _end(self, step: Begun) -> Step | Skipped:
        """Return what became of a step, with what was measured of its samples."""
        event = super()._end(step)
        rollout, criterion = self._rollouts.pop(step.number)
        if isinstance(event, Skipped):
            return event
        metrics = {**rollout.metrics, **event.metrics}
        if criterion.largest_gap is not None:
            metrics["largest_sampler_gap"] = float(criterion.largest_gap)
        tokens = sum(len(example.tokens) for example in rollout.examples)
        return replace(event, tokens=tokens, metrics=metrics)

    def _note_faults(self, judged: Judged, where: str) -> None:
        """Tell a person of each fault of a reward when it comes for the first time."""
        if new := judged.faults.keys() - self._faulty:
            self._faulty |= new
            counts = ", ".join(f"{what} {n} times" for what, n in sorted(judged.faults.items()))
            self._notices.append(
                f"{judged.first_fault} In {where}: {counts}. Such answers count for nothing; "
                "metrics.jsonl has their number (reward_faults)."
            )


def course_of(training: TrainConfig) -> TrainConfig:
    """Return a course whose steps and passes are not chosen by the tokens of prompts."""
    if training.steps is None and training.epochs is None:
        training = replace(training, steps=STEPS)
    return replace(training, tokens_per_step=training.tokens_per_step or TOKENS_PER_PASS)


def context_of(config: PretrainedConfig) -> int:
    """Return how many tokens a prompt and its answer may have, by a model's configuration."""
    return min(own_context(config.get_text_config()) or LONGEST_CONTEXT, LONGEST_CONTEXT)
