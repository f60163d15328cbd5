"""A search from end to end: trials that train together, and the best of them left as a run."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path

from veneer.data.columns import lengths_of
from veneer.data.packing import StepOrder
from veneer.errors import DivergedError, VeneerError
from veneer.files import new_directory
from veneer.formats import native
from veneer.run_directory import RunDirectory
from veneer.run_lock import RunLock
from veneer.training.config import TOKENS_PER_PASS
from veneer.training.events import (
    DataReady,
    Encoding,
    Evaluated,
    Event,
    Failed,
    ModelReady,
    Notice,
    Started,
    Step,
    Stopped,
    Written,
)
from veneer.training.many.planned import DoesNotFit
from veneer.training.many.tune import ALL, named, tune_many
from veneer.training.prepare import Prepared, prepare, settings_of
from veneer.training.recipe import Recipe
from veneer.training.search.check import check_held_out, check_kind, checked_values
from veneer.training.search.config import SearchConfig
from veneer.training.search.directory import STUDY, TRIALS, check_directory, clear, leave_best
from veneer.training.search.result import (
    Cost,
    SearchBegun,
    Searched,
    SearchResult,
    State,
    TrialBegun,
    TrialEnded,
    TrialResult,
    ranked,
    write_result,
)
from veneer.training.search.space import (
    Over,
    Space,
    Value,
    few_of,
    grid_of,
    space_of,
    usual_values,
    with_values,
)
from veneer.training.search.study import (
    NINTH,
    THIRD,
    SearchStudy,
    study_errors,
)
from veneer.training.tune import take

# Steps that the first trial makes alone, of which the first is not timed: what it costs to share no
# pass is measured, and nothing is done twice for it.
ALONE = 3


def search(
    recipe: Recipe,
    over: Over,
    config: SearchConfig | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    ignore_plan: bool = False,
    tokens_per_pass: int = TOKENS_PER_PASS,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, Event]]:
    """Try settings of a recipe, several at a time over one base, and yield each event with the name
    of its trial, or with "" where it is of all; the last is Searched.

    over: what varies, as in {"lr": "1e-4..3e-3", "rank": [4, 8, 16]}; all else is the recipe's. The
    first trial is the recipe's own run, where the ranges have it. Trials that do badly on the
    held-out rows end early, and others begin in their places. Below `recipe.out` are the study,
    each trial's recipe and metrics, a table, and, as a run's directory has them, the adapter, the
    recipe and the metrics of the best trial.

    `resume` goes on with the search there, `force` replaces it. Raises VeneerError of the kind that
    fits where the recipe, the data or a value cannot be used, before anything is trained.
    """
    config = config or SearchConfig()
    check_kind(recipe)
    space = space_of(over, recipe)
    grid = grid_of(space, most=config.trials) if config.sampler == "grid" else []
    grid = grid or few_of(space, most=config.trials)
    check_directory(recipe.out, resume=resume, force=force)
    ahead = checked_values(recipe, space)
    prepared = yield from named(ALL, prepare(ahead))
    check_held_out(prepared.rows, space)
    lock = RunLock(recipe.out)
    try:
        if killed := take(lock, recipe.out, may_hold_a_run=True):
            yield ALL, Notice(killed)
        check_directory(recipe.out, resume=resume, force=force)  # again, for it may be there by now
        if force:
            clear(recipe.out)
        with study_errors(recipe.out / STUDY):
            trials = _Trials(recipe, prepared, space, config, should_stop)
            trials.start_with(grid)
            yield ALL, SearchBegun(trials.most, trials.drawn - len(trials.waiting))
            while first := trials.first():
                yield from trials.late()
                for name, event in tune_many(
                    first,
                    resume=any(each.out.exists() for each in first.values()),
                    ignore_plan=ignore_plan,
                    tokens_per_pass=tokens_per_pass,
                    joining=trials.joining,
                    should_stop=trials.should_stop,
                    merges=False,
                    evaluate_at=trials.evaluate_at,
                    saves=trials.saves,
                ):
                    yield from trials.take(name, event)
            yield from trials.late()
            result = trials.result()
            write_result(result, recipe.out)
            if result.best is not None:
                leave_best(result.best, recipe.out)
            yield ALL, Searched(result)
    finally:
        lock.release()


class _Trials:
    """The trials of a search: which train, which begin next, and what becomes of each.

    waiting: trials that were drawn and have to begin, or go on. most: trials in all. together: at
    most, at a time. unsaid: events of trials that began while nothing could be yielded
    """

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        space: Space,
        config: SearchConfig,
        should_stop: Callable[[], bool],
    ) -> None:
        self.out, self.config, self.asked_to_stop = recipe.out, config, should_stop
        self.prepared = prepared
        # A rate that the recipe leaves open is chosen by each trial for itself.
        course = replace(prepared.recipe.training, lr=recipe.training.lr)
        self.steps_of = cache(self._steps_of)
        steps = fewest = course.steps or self.steps_of(course.tokens_per_step, course.seed)
        if course.steps is None and "tokens_per_step" in space:
            tokens = max(int(str(value)) for value in space["tokens_per_step"].bounds)
            fewest = self.steps_of(tokens, course.seed)
        if config.share < 1:
            course = replace(course, epochs=None, steps=math.ceil(config.share * steps))
        self.recipe = replace(prepared.recipe, training=course)
        self.study = SearchStudy(
            recipe.out / STUDY,
            space,
            config,
            seed=recipe.training.seed % 2**32,
            steps=math.ceil(config.share * fewest),
        )
        # Evaluations cost as much as many steps where few rows are learnt from: no more of them
        # than the pruner asks for.
        self.evaluate_at = [Fraction(1, 9)] if NINTH in self.study.points else []
        self.evaluations = 9 if config.pruner == "median" else 3
        of_space = {name: str(each) for name, each in space.items()}
        self.study.settle({**settings_of(self.recipe), "data": prepared.data, "over": of_space})
        self.unsaid: list[tuple[str, Event]] = []
        self.began = self.counted = time.perf_counter()  # the seconds up to `counted` are noted
        self.training: dict[str, TrialResult] = {}  # by name
        self.attached: set[str] = set()  # those whose adapters are, or were
        self.noticed: set[str] = set()  # texts of notices
        self.steps: dict[str, int] = {}  # that each has in all
        self.leaving: set[str] = set()  # those that make way for others
        self.timed: list[Step] = []  # of the first trial, alone
        # Those that have a directory come first: `tune_many` goes on only where there is one.
        self.waiting = sorted(
            self.study.unfinished(), key=lambda trial: not self._directory(trial).exists()
        )
        earlier = self.study.trials()
        self.drawn, self.most, self.together = len(earlier), config.trials, config.together
        losses = (trial.loss for trial in earlier if trial.state == "complete")
        self.best = min((loss for loss in losses if loss is not None), default=math.inf)
        self.usual = usual_values(prepared.recipe, space)

    def start_with(self, combinations: Sequence[Mapping[str, Value]]) -> None:
        """Let each of these combinations have one trial, and nothing else; or, if there are none,
        begin with the recipe's own run."""
        usual = [self.usual] if self.usual and self.config.sampler != "grid" else []
        for values in (*usual, *combinations):
            self.study.first(values)
        if combinations:
            self.most = self.drawn + self.study.enqueued

    def first(self) -> dict[str, Recipe]:
        """Return the trial that begins before the others, which join it where there is memory."""
        return self._next(1)

    def joining(self) -> dict[str, Recipe]:
        """Return the trials that begin now, in the places of those that have ended."""
        alone = self.study.speed_alone is None and len(self.timed) < ALONE
        if alone and len(self.training) == 1 and not self.leaving:
            return {}
        return self._next(self.together - len(self.training))

    def _next(self, most: int) -> dict[str, Recipe]:
        minutes = self.config.minutes
        late = minutes is not None and time.perf_counter() - self.began > 60 * minutes
        begun: dict[str, Recipe] = {}
        while len(begun) < most and not (late or self.asked_to_stop()):
            if self.waiting:
                begun |= self._begin(self.waiting.pop(0))
            elif self.drawn < self.most:
                self.drawn += 1
                begun |= self._begin(self.study.ask())
            else:
                break
        return begun

    def _begin(self, trial: TrialResult) -> dict[str, Recipe]:
        """Return the recipe of a trial by its name; one that can have none has failed."""
        self.training[trial.name] = trial
        self.unsaid.append((trial.name, TrialBegun(trial)))
        try:
            return {trial.name: self._recipe(trial)}
        except VeneerError as error:
            self.unsaid.append(self._end(trial.name, "failed", why=str(error)))
            return {}

    def _recipe(self, trial: TrialResult) -> Recipe:
        recipe = with_values(self.recipe, trial.values)
        course, share = recipe.training, self.config.share
        if share < 1 and self.prepared.recipe.training.steps is None:
            steps = self.steps_of(course.tokens_per_step, course.seed)
            course = replace(course, epochs=None, steps=math.ceil(share * steps))
        if course.eval_every is None:
            steps = course.steps or self.steps_of(course.tokens_per_step, course.seed)
            course = replace(course, eval_every=math.ceil(steps / self.evaluations))
        return replace(recipe, training=course, out=self._directory(trial))

    def _directory(self, trial: TrialResult) -> Path:
        return self.out / TRIALS / trial.name

    def _steps_of(self, tokens_per_step: int, seed: int) -> int:
        """Return the steps of a run with so many tokens in each."""
        course = replace(self.prepared.recipe.training, tokens_per_step=tokens_per_step, seed=seed)
        lengths = lengths_of(self.prepared.rows.examples)
        order = StepOrder(lengths, tokens_per_step, course.batch_tokens, seed)
        return order.steps(course.epochs or 1)

    def should_stop(self, name: str) -> bool:
        """Return whether a trial ends after its step."""
        return name in self.leaving or self.asked_to_stop()

    def saves(self, name: str) -> bool:
        """Return whether a trial's state is worth a checkpoint: one that is stopped to go on, or
        that has come so far that it may well go to its end."""
        far = max(self.training[name].losses, default=0) >= THIRD
        return name not in self.leaving and (far or self.asked_to_stop())

    def take(self, name: str, event: Event) -> Iterator[tuple[str, Event]]:
        """Take what an event of a trial says, and yield what is to be known of it."""
        yield from self.late()
        match event:
            case Failed(DoesNotFit() as unfit) if len(self.training) > 1:
                yield self._defer(name, unfit)
                return
        # What a trial is made ready with is that of all, which was said; but not how it trains.
        if isinstance(event, Notice) and name in self.attached - {*self.steps}:
            if event.text not in self.noticed:
                yield name, event
            self.noticed.add(event.text)
        elif name == ALL or not isinstance(event, DataReady | Encoding | ModelReady | Notice):
            yield name, event
        match event:
            case ModelReady():
                self.attached.add(name)
            case Started(steps):
                self.steps[name] = steps
            case Step() if self.study.speed_alone is None and len(self.training) == 1:
                self._time(event)
            case Evaluated(step, loss) if step:
                trial = self.training[name]
                done = round(100 * step / self.steps[name])
                # Whoever was overtaken, and got here all the same, is judged by where it is now:
                # its loss counts for the others, and if the best made way there would be none.
                self.leaving.discard(name)
                if math.isfinite(loss):
                    self.training[name] = replace(trial, losses={**trial.losses, done: loss})
                if done not in trial.losses and self.study.report(trial.number, done, loss):
                    self.leaving.add(name)
                overtaken = self.study.overtaken()
                self.leaving |= {n for n, it in self.training.items() if it.number in overtaken}
            case Stopped(_, "interrupted") if name in self.leaving:
                yield self._end(name, "pruned")
            case Stopped(_, "interrupted"):
                self.study.note_steps(self._counted(name))
                del self.training[name]
            case Written("adapter", place):
                yield self._complete(name, place)
            case Failed(error):
                state: State = "pruned" if isinstance(error, DivergedError) else "failed"
                yield self._end(name, state, why=event.why)

    def late(self) -> Iterator[tuple[str, Event]]:
        """Yield what is unsaid."""
        yield from self.unsaid
        self.unsaid.clear()

    def _defer(self, name: str, error: DoesNotFit) -> tuple[str, Event]:
        """Let a trial for which there is no memory begin when another has ended, and from now on no
        more train at a time than do now."""
        self.waiting.append(self.training.pop(name))
        self.together = len(self.training)
        return ALL, Notice(f"No more than {self.together} trials train at a time: {error}")

    def _time(self, step: Step) -> None:
        """Time the first steps of a trial that is alone."""
        self.timed.append(step)
        if len(self.timed) == ALONE:
            timed = self.timed[1:]
            seconds = sum(each.seconds for each in timed)
            self.study.speed_alone = sum(each.tokens for each in timed) / seconds

    def _complete(self, name: str, adapter: Path) -> tuple[str, Event]:
        """Keep the adapter of a trial if none was better, and note that the trial is complete."""
        loss = self.training[name].loss
        if loss is None:  # nothing finite was measured
            return self._end(name, "pruned")
        if loss < self.best:
            self.best = loss
            kept = RunDirectory(self.out).adapter()
            with new_directory(kept, marker=native.config_name("lora")) as directory:
                shutil.copytree(adapter, directory, dirs_exist_ok=True)
        return self._end(name, "complete")

    def _end(self, name: str, state: State, *, why: str = "") -> tuple[str, Event]:
        """Note how a trial has ended, and keep its recipe and its metrics alone."""
        trial = replace(self._counted(name), state=state)
        del self.training[name]
        self.leaving.discard(name)
        self.study.end(trial)
        run = RunDirectory(self._directory(trial))
        for directory in (run.checkpoints, run.adapter()):
            shutil.rmtree(directory, ignore_errors=True)
        self._note_seconds()
        return name, TrialEnded(trial, why)

    def _counted(self, name: str) -> TrialResult:
        """Return a trial with the steps and tokens that it has learnt from by its metrics."""
        lines = RunDirectory(self._directory(self.training[name])).read_metrics()
        steps = [line for line in lines if "loss" in line]
        return replace(
            self.training[name],
            steps=len(steps),
            tokens=sum(line["tokens"] for line in steps),
            all_steps=self.steps.get(name, 0),
        )

    def _note_seconds(self) -> None:
        now = time.perf_counter()
        self.study.seconds += now - self.counted
        self.counted = now

    def result(self) -> SearchResult:
        """Return what has become of all trials."""
        self._note_seconds()
        trials, recipe = self.study.trials(), self.recipe
        cost = Cost(
            seconds=self.study.seconds,
            tokens=sum(trial.tokens for trial in trials),
            all_tokens=round(sum(t.tokens / t.steps * t.all_steps for t in trials if t.steps)),
            alone=self.study.speed_alone,
        )
        data = str(recipe.settings()["data"])
        return SearchResult(recipe.model, data, ranked(trials), cost)
