"""Trials kept in an Optuna study, in a file that Optuna and its dashboard open."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from sqlite3 import connect
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError, VeneerError, joined
from veneer.files import storage_error
from veneer.training.search.config import SearchConfig
from veneer.training.search.result import State, TrialResult
from veneer.training.search.space import Range, Space, Value, Values

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

NAME = "veneer"  # of the study in its file
# Successive halving by three: trials are judged at a ninth and at a third of their steps, in per
# cents; where that is before LEAST steps, which say little of the rest, at two thirds.
NINTH, THIRD, TWO_THIRDS = 11, 33, 67
LEAST, KEEP_ONE_OF = 8, 3
AT_RANDOM = 10  # trials, at most, of which the sampler learns before it chooses
# Attributes of the study, and of its trials.
SETTINGS, SPEED, SECONDS, STEPS = "settings", "tokens a second alone", "seconds", "steps"


@contextmanager
def study_errors(path: Path) -> Iterator[None]:
    """In this context errors of a study's file, which a full disk or another program that holds it
    brings about, are VeneerErrors."""
    try:
        yield
    except Exception as error:
        # Optuna's have SQLAlchemy's as their causes, and no words about what happened.
        if type(error).__module__.partition(".")[0] not in ("optuna", "sqlalchemy", "sqlite3"):
            raise
        cause = error.__cause__ or error
        why = str(cause).partition("\n")[0]
        raise storage_error(cause, path) or VeneerError(
            f"{path} cannot be used as a study: {why}. Go on with the same command and --resume, "
            "or start anew by --force."
        ) from error


class SearchStudy:
    """A study in a file: trials are asked of it, and told how they go.

    steps: the fewest that a trial can have. points: the per cents of them at which halving judges
    trials, each with that until which it judges them again as others come to the point.

    Raises VeneerError where Optuna, which comes with the extra `search`, is not installed.
    """

    def __init__(
        self, path: Path, space: Space, config: SearchConfig, *, seed: int, steps: int
    ) -> None:
        try:
            import optuna
        except ImportError as error:
            raise VeneerError("A search needs Optuna: pip install 'veneer[search]'") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        path.parent.mkdir(parents=True, exist_ok=True)
        samplers = optuna.samplers
        self._optuna, self._space = optuna, space
        ways = ({NINTH: THIRD, THIRD: TWO_THIRDS}, {THIRD: TWO_THIRDS}, {TWO_THIRDS: 100})
        judged = next((points for points in ways if min(points) >= 100 * LEAST // steps), {})
        self.points: Mapping[int, int] = judged if config.pruner == "halving" else {}
        try:
            self.study: Study = optuna.create_study(
                storage=optuna.storages.RDBStorage(
                    "sqlite:///study.db",
                    # The address of a path with ? or % would be read as another's.
                    engine_kwargs={"creator": partial(connect, path, check_same_thread=False)},
                ),
                study_name=NAME,
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(
                    n_startup_trials=4, n_warmup_steps=max(NINTH, 100 * LEAST // steps)
                )
                if config.pruner == "median"
                else optuna.pruners.NopPruner(),  # for halving see `overtaken`
            )
        except Exception as error:  # SQLAlchemy's, of many kinds
            why = str(error).partition("\n")[0]
            raise storage_error(error.__cause__ or error, path) or VeneerError(
                f"{path} cannot be opened as a study: {why}. Start anew by --force, or "
                "name another --out."
            ) from error
        # It is asked for at every step, and the file would be read for it.
        self._speed_alone: float | None = self.study.user_attrs.get(SPEED)
        # Of a study that goes on, trials that were drawn are not drawn again.
        seed += len(self.study.trials)
        self.study.sampler = (
            samplers.RandomSampler(seed=seed)
            if config.sampler != "tpe"  # a grid draws nothing
            else samplers.TPESampler(
                seed=seed,
                n_startup_trials=max(1, min(AT_RANDOM, config.trials // KEEP_ONE_OF)),
                constant_liar=True,  # of trials that train yet
            )
        )
        self._live: dict[int, Trial] = {}  # by number
        self._distributions = {name: self._distribution(each) for name, each in space.items()}

    def _distribution(self, each: Range | Values) -> BaseDistribution:
        kinds = self._optuna.distributions
        if isinstance(each, Values):
            return kinds.CategoricalDistribution(each.bounds)
        if each.whole:
            return kinds.IntDistribution(int(each.low), int(each.high), log=each.log)
        return kinds.FloatDistribution(each.low, each.high, log=each.log)

    def settle(self, settings: Mapping[str, Any]) -> None:
        """Keep what decides all trials, or check that it is still the same.

        Raises ConfigError where a search that goes on is another one.
        """
        now = json.loads(json.dumps(settings))
        before = self.study.user_attrs.get(SETTINGS)
        if before is None:
            self.study.set_user_attr(SETTINGS, now)
            return
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names:
            changes = (f"{name} ({before.get(name)} there, {now.get(name)} here)" for name in names)
            raise ConfigError(
                f"The search is another one than that in its directory: {joined(changes)}. Leave "
                "that as it was, or start anew by --force or another --out."
            )

    def first(self, values: Mapping[str, Value]) -> None:
        """Let a trial have these values, before others are drawn, unless one has had them."""
        self.study.enqueue_trial(dict(values), skip_if_exists=True)

    @property
    def enqueued(self) -> int:
        """The trials whose values are known and that have not been asked for."""
        waiting = self._optuna.trial.TrialState.WAITING
        return sum(trial.state == waiting for trial in self.study.get_trials(deepcopy=False))

    def ask(self) -> TrialResult:
        """Return a new trial, with its values."""
        trial = self.study.ask(self._distributions)
        self._live[trial.number] = trial
        return TrialResult(trial.number, trial.params, "running")

    def report(self, number: int, done: int, loss: float) -> bool:
        """Note the loss of a trial that has done so many per cent of its steps, and return whether
        it ends since its loss is not finite, or above the median; for halving see `overtaken`."""
        if not math.isfinite(loss):
            return done < 100
        trial = self._live[number]
        trial.report(loss, done)
        return done < 100 and trial.should_prune()

    def overtaken(self) -> set[int]:
        """Return the trials that train which by now are not among the best at the point that they
        came past last, or past all of those since their last measurement. Whoever comes to one
        first goes past it, however bad, and is judged again as others come to it."""
        trials = self.study.get_trials(deepcopy=False)
        overtaken: set[int] = set()
        for point, until in self.points.items():
            after = {
                trial.number: [
                    each for each in trial.intermediate_values.items() if each[0] >= point
                ]
                for trial in trials
            }
            # When each was measured at the point, or next after it, and what came out.
            measured = {number: min(each) for number, each in after.items() if each}
            losses = sorted(loss for _, loss in measured.values())
            # Rounded up, since who makes way is not called back as others do worse.
            stay = losses[: math.ceil(len(losses) / KEEP_ONE_OF)]
            for number in self._live.keys() & measured.keys():
                done, loss = measured[number]
                now = max(trials[number].intermediate_values)
                if loss > stay[-1] and (now < until or now == done < 100):
                    overtaken.add(number)
        return overtaken

    def note_steps(self, trial: TrialResult) -> None:
        """Note how many steps and tokens a trial has learnt from, and the steps that it has."""
        counts = [trial.steps, trial.tokens, trial.all_steps]
        self._live[trial.number].set_user_attr(STEPS, counts)

    def end(self, trial: TrialResult) -> None:
        """Note how a trial has ended, with its loss if it is complete."""
        self.note_steps(trial)
        in_study, states = self._live.pop(trial.number), self._optuna.trial.TrialState
        if trial.state == "complete":
            self.study.tell(in_study, trial.loss)
        else:
            state = states.PRUNED if trial.state == "pruned" else states.FAIL
            self.study.tell(in_study, state=state)

    @property
    def speed_alone(self) -> float | None:
        """Tokens that a trial alone learns from in a second, None where that is not known yet."""
        return self._speed_alone

    @speed_alone.setter
    def speed_alone(self, value: float) -> None:
        self._speed_alone = value
        self.study.set_user_attr(SPEED, value)

    @property
    def seconds(self) -> float:
        """How long the search has taken, in all its sessions."""
        return float(self.study.user_attrs.get(SECONDS, 0.0))

    @seconds.setter
    def seconds(self, value: float) -> None:
        self.study.set_user_attr(SECONDS, value)

    def unfinished(self) -> list[TrialResult]:
        """Return the trials that had not ended when the search was interrupted, to go on."""
        running = [trial for trial in self.trials() if trial.state == "running"]
        ids = {trial.number: trial._trial_id for trial in self.study.trials}
        for trial in running:
            self._live[trial.number] = self._optuna.trial.Trial(self.study, ids[trial.number])
        return running

    def trials(self) -> list[TrialResult]:
        """Return all trials that were drawn, by their numbers."""
        waiting = self._optuna.trial.TrialState.WAITING
        return [self._result(trial) for trial in self.study.trials if trial.state != waiting]

    def _result(self, trial: FrozenTrial) -> TrialResult:
        states: dict[str, State] = {
            "RUNNING": "running",
            "COMPLETE": "complete",
            "PRUNED": "pruned",
            "FAIL": "failed",
        }
        steps, tokens, all_steps = trial.user_attrs.get(STEPS, (0, 0, 0))
        losses = dict(sorted(trial.intermediate_values.items()))
        return TrialResult(
            trial.number,
            trial.params,
            states[trial.state.name],
            losses,
            steps=steps,
            tokens=tokens,
            all_steps=all_steps,
        )
