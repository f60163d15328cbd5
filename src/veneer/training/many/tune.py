"""Whole runs of `tune` over one base at a time, each with its data and its results."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from veneer.adapter.attach import detach
from veneer.adapter.use import adapters, use
from veneer.data.sources import spelt
from veneer.errors import ConfigError, VeneerError, listed
from veneer.models.device import begin_peak, resolve_device
from veneer.models.fingerprint import fingerprint
from veneer.models.load import Base, load_base
from veneer.objectives.config import ANSWERS
from veneer.plan.plan import Plan
from veneer.processes.world import World
from veneer.run_directory import RunDirectory, checkpoint_steps
from veneer.run_lock import RunLock
from veneer.training.config import TOKENS_PER_PASS
from veneer.training.evaluate import Measurement
from veneer.training.events import Event, Failed, Measured, Notice, Planned
from veneer.training.many.planned import (
    check_fits_together,
    check_space_together,
    plan_together,
)
from veneer.training.many.problems import JobProblems
from veneer.training.many.running import Job
from veneer.training.many.schedule import check_limit
from veneer.training.many.train import train_many
from veneer.training.memory import begin_measuring
from veneer.training.metrics import record
from veneer.training.one_of_several import OneOfSeveral
from veneer.training.plan_before import why_no_plan
from veneer.training.planned import available_memory, check_host
from veneer.training.preflight import Preflight, preflight
from veneer.training.prepare import Prepared, prepare
from veneer.training.recipe import Recipe
from veneer.training.results import clear_state, to_the_end
from veneer.training.rows import RunRows
from veneer.training.tune import attach_job, take

ALL = ""  # the name with events that are of no job, but of all of them
# Settings of the base and of passes, which jobs share.
SHARED = ("model", "device", "dtype", "bits", "pack_head", "shard", "offload", "recompute")
EXTENDS = "extends the base's vocabulary, which all jobs share; train it by itself"


def tune_many(
    recipes: Mapping[str, Recipe],
    *,
    resume: bool = False,
    force: bool = False,
    ignore_plan: bool = False,
    tokens_per_pass: int = TOKENS_PER_PASS,
    joining: Callable[[], Mapping[str, Recipe]] = dict,
    should_stop: Callable[[str], bool] = lambda name: False,
    merges: bool = True,
    evaluate_at: Sequence[Fraction] = (),
    saves: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, Event]]:
    """Train as each recipe says, by `train_many`, and yield each event with the name of its job, or
    with "" where it is of all.

    Every recipe has a directory of its own, `out`, with what `tune` would leave there; without its
    merged model unless `merges`. `resume` goes on from the newest checkpoint in each, and starts
    those that have none. `joining` is asked before each pass for recipes that begin now. A job that
    fails, or cannot join, ends by Failed, and the others go on. For jobs that are compared: each
    evaluates after the shares of its steps in `evaluate_at` too, and writes no checkpoint while
    `saves` returns False for its name.

    Raises, before the base is loaded, ConfigError for whatever is wrong with any of `recipes`, all
    of it at once and by the names of the jobs.
    """
    check_limit(tokens_per_pass)
    if not recipes:
        raise ConfigError("There are no jobs.")
    if World.current().size > 1:
        raise ConfigError("Several jobs train in one process; start one alone, without torchrun.")
    if on_samples := [n for n, each in recipes.items() if each.objective.shape == "prompts"]:
        raise ConfigError(
            f"{listed(on_samples)} learn from their own samples, which jobs do not draw together "
            "yet; train each alone."
        )
    if resume and not any(recipe.out.exists() for recipe in recipes.values()):
        places = ", ".join(str(recipe.out) for recipe in recipes.values())
        raise ConfigError(f"There are no runs to go on with: none of {places} exists.")
    runs = _Runs(recipes, resume, force, ignore_plan, tokens_per_pass, merges, evaluate_at, saves)
    try:
        yield from runs.prepare(recipes)
        yield from runs.load()
        jobs: dict[str, Job] = {}
        yield from runs.begin(recipes, jobs)
        begin_measuring()
        begin_peak(runs.base.model.device)
        measured = False
        of_joining: list[tuple[str, Event]] = []  # which came while nothing could be yielded

        def join() -> dict[str, Job]:
            begun: dict[str, Job] = {}
            for name, recipe in joining().items():
                try:
                    of_joining.extend(runs.prepare({name: recipe}))
                    of_joining.extend(runs.begin({name: recipe}, begun))
                except (VeneerError, OSError) as error:
                    of_joining.append((name, Failed(error)))
                    if not runs.trains(name):
                        runs.release(name)
            return begun

        for adapter, event in train_many(
            runs.base.model,
            jobs,
            tokens_per_pass=tokens_per_pass,
            joining=join,
            should_stop=lambda adapter: should_stop(runs.names[adapter]),
        ):
            yield from of_joining
            of_joining.clear()
            if isinstance(event, Failed):
                runs.forget(adapter)
            if not isinstance(event, Measured):
                yield runs.names[adapter], event
            elif not measured:  # for the first, no model has been merged yet, which takes more
                measured = True
                yield ALL, event
        yield from of_joining
    finally:
        runs.release()


class _Runs:
    """The runs of recipes over one base: what is read and planned for each, and their jobs.

    names: of the runs, by those of their adapters
    """

    def __init__(
        self,
        recipes: Mapping[str, Recipe],
        resume: bool,
        force: bool,
        ignore_plan: bool,
        tokens_per_pass: int,
        merges: bool,
        evaluate_at: Sequence[Fraction],
        saves: Callable[[str], bool],
    ) -> None:
        self.resume, self.force, self.ignore_plan = resume, force, ignore_plan
        self.tokens_per_pass, self.merges = tokens_per_pass, merges
        self.evaluate_at, self.saves = evaluate_at, saves
        self.first = next(iter(recipes.values()))
        self.names: dict[str, str] = {}
        self.device = resolve_device(self.first.device)
        self.plan: Plan | None = None
        self._ahead: Preflight | None = None  # of the first run
        self._prepared: dict[str, Prepared] = {}  # of runs that have not ended
        self._rows: dict[Any, RunRows] = {}  # by all that decides them
        # What the base's own function comes to, by the rows and how they are batched.
        self._at_start: dict[Any, list[Measurement]] = {}
        self._base: Base | None = None
        self._resumed: dict[str, bool] = {}  # whether a run goes on from what is in its directory
        self._locks: dict[str, RunLock] = {}

    @property
    def base(self) -> Base:
        """The base, once it is loaded."""
        assert self._base is not None
        return self._base

    def trains(self, name: str) -> bool:
        """Return whether a run of that name is one of those that have not ended."""
        return name in self._prepared

    def release(self, *names: str) -> None:
        """Let others have the directories of these runs, or of all."""
        for name in names or [*self._locks]:
            if lock := self._locks.pop(name, None):
                lock.release()

    def forget(self, adapter: str) -> None:
        """Let go of a run that failed before its course began; others have done so themselves."""
        if adapter in adapters(self.base.model):
            name = self.names[adapter]
            detach(self.base.model, adapter)
            del self._prepared[name]
            self.release(name)

    def prepare(self, recipes: Mapping[str, Recipe]) -> Iterator[tuple[str, Event]]:
        """Check the recipes, read their rows, and see that there is room for them beside those
        that train. Raises ConfigError for all that is wrong with them."""
        self._check_together(recipes)
        problems = JobProblems()
        begun: dict[str, Preflight] = {}
        for name, recipe in recipes.items():
            with problems.of(name):
                self._resumed[name] = self.resume and recipe.out.exists()
                ahead = preflight(
                    recipe,
                    resume=self._resumed[name],
                    force=self.force,
                    ignore_space=True,  # that of all of them together is checked below
                    beside=self._ahead,
                )
                self._ahead = self._ahead or ahead
                if ahead.dtype_name != (shared := self._ahead.dtype_name):
                    raise ConfigError(
                        f"its checkpoint was computed in {ahead.dtype_name}, and the first job is "
                        f"in {shared}; go on with it by itself"
                    )
                begun[name] = ahead
                self._locks[name] = RunLock(recipe.out)
                may_hold_a_run = self._resumed[name] or self.force
                if killed := take(self._locks[name], recipe.out, may_hold_a_run=may_hold_a_run):
                    yield name, Notice(killed)
        problems.end()
        if not self.ignore_plan:
            check_space_together(begun.values(), self.device, merges=self.merges)
        new: dict[str, Prepared] = {}
        for name, ahead in begun.items():
            with problems.of(name):
                key = _key_of_rows(ahead)
                work = prepare(ahead, rows=self._rows.get(key))
                if ahead.start is not None and ahead.start.new_tokens:
                    raise ConfigError(f"{ahead.recipe.start_from} {EXTENDS}")
                new[name] = each = yield from named(name, work)
                self._rows[key] = each.rows
        problems.end()
        joins = self._base is not None  # while others train, and say nothing of the plan again
        of_all = [*self._prepared.values(), *new.values()]
        if why := next(filter(None, (why_no_plan(e.ahead, self.device) for e in of_all)), ""):
            if not joins:
                yield ALL, Notice(f"No memory is planned for these jobs: {why}")
        else:
            plan = plan_together(of_all, self.tokens_per_pass)
            available = available_memory(self.device)
            if not self.ignore_plan:
                check_fits_together(plan, available)
                check_host(plan, 1)
            self.plan = plan
            if not joins:
                yield ALL, Planned(plan, available)
        self._prepared |= new

    def load(self) -> Iterator[tuple[str, Event]]:
        """Load the base."""
        assert self._ahead is not None
        first = self.first
        if first.shard == "base":
            yield ALL, Notice("The base is not sharded: jobs train in one process.")
        self._base = load_base(
            first.model,
            device=first.device,
            dtype=self._ahead.dtype_name,
            bits=first.loaded_bits,
            pack_head=first.pack_head,
            tokenizer=self._ahead.tokenizer,
            offload=first.offload,
            offload_directory=first.out,
        )
        for text in self._base.notices:
            yield ALL, Notice(text)
        self._base.model.requires_grad_(False)
        self._fingerprint = fingerprint(self._base.model, self._base.tokenizer)

    def begin(
        self, recipes: Mapping[str, Recipe], jobs: dict[str, Job]
    ) -> Iterator[tuple[str, Event]]:
        """Attach the adapters of recipes that are prepared, and add their jobs by these adapters'
        names. Nothing of earlier runs is touched before all of them are attached."""
        problems, model = JobProblems(), self.base.model
        training = [weight for weight in model.parameters() if weight.requires_grad]
        new: dict[str, Job] = {}
        for name in recipes:
            adapter = f"job {len(self.names)}"
            self.names[adapter] = name
            with problems.of(name):
                model.requires_grad_(False)
                attaching = attach_job(
                    self._prepared[name], self.base, force=self.force, name=adapter
                )
                yield from ((name, event) for event in attaching)
                new[adapter] = self._job(name, adapter)
        use(model, None)  # adapters go as their jobs end
        for weight in training:  # which attaching has frozen
            weight.requires_grad_(True)
        try:
            problems.end()
        except ConfigError:
            for name in recipes:
                self._prepared.pop(name)
            raise
        for name, recipe in recipes.items():
            if not self._resumed[name]:
                clear_state(RunDirectory(recipe.out))
        jobs.update(new)

    def _job(self, name: str, adapter: str) -> Job:
        """Return a run as a job, which writes what `tune` does and then detaches its adapter."""
        prepared, base = self._prepared[name], self.base
        recipe, rows = prepared.recipe, prepared.rows
        run, identity = RunDirectory(recipe.out), prepared.identity(self._fingerprint)
        resume, plan = self._resumed[name], self.plan

        def through(events: Iterator[Event]) -> Iterator[Event]:
            results = to_the_end(
                events, recipe, base, identity, plan=plan, resume=resume, merges=self.merges
            )
            try:
                yield from record(results, run)
            finally:
                detach(base.model, adapter)
                del self._prepared[name]
                self.release(name)

        return Job(
            rows.examples,
            recipe.training,
            recipe.objective,
            held_out=rows.held_out,
            directory=run.checkpoints,
            identity={"computed_in": prepared.ahead.dtype_name, **identity},
            resume=resume and bool(checkpoint_steps(run.checkpoints)),
            through=through,
            among=OneOfSeveral(
                self.evaluate_at, lambda: self.saves(name), self._measured_at_start(prepared)
            ),
        )

    def _measured_at_start(self, prepared: Prepared) -> list[Measurement]:
        """Return where a run keeps what its held-out rows come to before the first step: with all
        others that begin at the base's own function, or by itself."""
        recipe = prepared.recipe
        if recipe.start_from or recipe.objective != ANSWERS or not recipe.lora.starts_at_base:
            return []
        key = (_key_of_rows(prepared.ahead), recipe.training.batch_tokens)
        return self._at_start.setdefault(key, [])

    def _check_together(self, recipes: Mapping[str, Recipe]) -> None:
        """Raise ConfigError for recipes that cannot share a base and its passes."""
        problems = JobProblems()
        first = self.first.settings()
        training = [each.recipe.out.absolute() for each in self._prepared.values()]
        places = training + [recipe.out.absolute() for recipe in recipes.values()]
        for name, recipe in recipes.items():
            own = recipe.settings()
            wrong = [
                f"{key} is {own[key]!r}, but {first[key]!r} for the first job, and all share it"
                for key in SHARED
                if own[key] != first[key]
            ]
            if recipe.method.method != "lora":
                wrong.append(f"{recipe.method.method} is no low-rank adapter; train it by itself")
            if recipe.rows.new_words is not None:
                wrong.append(f"new_words {EXTENDS}")
            if recipe.training.context_parallel > 1 or recipe.training.replay_passes:
                wrong.append("context_parallel and replay_passes are for a job alone")
            if name == ALL:
                wrong.append("a job must have a name")
            if name in self._prepared:
                wrong.append("a job of that name trains already")
            if places.count(recipe.out.absolute()) > 1:
                wrong.append(f"{recipe.out} is another job's directory too")
            for text in wrong:
                problems.add(name, text)
        problems.end()


def named(
    name: str, work: Generator[Event, None, Prepared]
) -> Generator[tuple[str, Event], None, Prepared]:
    """Yield the events of what makes a run ready with a name, and return what it does."""
    while True:
        try:
            event = next(work)
        except StopIteration as done:
            return done.value
        yield name, event


def _key_of_rows(ahead: Preflight) -> Any:
    """Return all that decides a run's rows and what is said of them, to compare it by."""
    recipe = ahead.recipe
    reports = recipe.out if recipe.rows.deduplicate or recipe.rows.skip_bad_rows else None
    objective = recipe.objective
    of_rows = (objective.shape, objective.is_ranking, recipe.lora.invocation, reports)
    return (tuple(spelt(recipe.data)), recipe.rows, recipe.training.seed, *of_rows)
