"""A short search before a run, for a rate or a rank that is left to it, and why it chose."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

from veneer.errors import ConfigError, TrainingError
from veneer.run_directory import RunDirectory
from veneer.training.choose import usual_rate
from veneer.training.events import Event, Notice
from veneer.training.many.tune import ALL
from veneer.training.preflight import preflight
from veneer.training.recipe import Recipe
from veneer.training.search.config import SearchConfig
from veneer.training.search.directory import STUDY
from veneer.training.search.result import TABLE, Searched, SearchResult
from veneer.training.search.run import search
from veneer.training.search.space import in_words, with_values

PLACE = "search"  # below the run's directory
# The usual rate is within a factor of two or three of the best (docs/training.md), so four to both
# sides have it; ranks are those that people take.
AROUND = 4.0
RANKS = (4, 8, 16, 64)
TRIALS = {1: 6, 2: 12}  # by how many settings are chosen
SHARE = 0.25  # of the run's steps, of a trial
# A loss that is lower by less than this share is noise of the few rows that are held out: the usual
# value stays.
LITTLE = 0.005

Events = Generator[tuple[str, Event], None, Recipe]


def settle_by_search(
    recipe: Recipe,
    names: Sequence[str],
    *,
    resume: bool = False,
    force: bool = False,
    ignore_plan: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Events:
    """Yield the events of a short search below the run's directory, and return the recipe with the
    values of `names` (lr, rank) that it has settled on.

    A run that goes on keeps the values that it began with. Raises TrainingError where the search is
    stopped, and VeneerError for what keeps the run itself from beginning.
    """
    if unknown := {*names} - {"lr", "rank"}:
        raise ConfigError(f"A search before a run is for lr and rank, not for {unknown.pop()}.")
    before = RunDirectory(recipe.out).read_recipe() if resume else {}
    if all(name in before for name in names):
        return with_values(recipe, {name: before[name] for name in names})
    ahead = preflight(
        recipe, resume=resume and recipe.out.exists(), force=force, ignore_space=ignore_plan
    )
    usual = usual_rate(ahead.recipe, ahead.config)
    space: dict[str, Any] = {
        "lr": f"{usual / AROUND:.2g}..{usual * AROUND:.2g}",
        "rank": tuple(sorted({*RANKS, recipe.lora.rank})),
    }
    short = replace(recipe, out=recipe.out / PLACE)
    if "lr" not in names and recipe.training.lr is None:
        short = replace(short, training=replace(short.training, lr=usual))
    config = SearchConfig(trials=TRIALS[len(names)], share=SHARE)
    result: SearchResult | None = None
    for name, event in search(
        short,
        {name: space[name] for name in names},
        config,
        resume=resume and (short.out / STUDY).exists(),
        force=force or ((short.out / STUDY).exists() and not resume),
        ignore_plan=ignore_plan,
        should_stop=should_stop,
    ):
        if isinstance(event, Searched):
            result = event.result
        else:
            yield name, event
    assert result is not None
    if should_stop():
        raise TrainingError(
            f"The search before the run was stopped; --resume goes on with it ({short.out})."
        )
    values, why = settled(result)
    yield ALL, Notice(f"{why} All trials: {short.out / TABLE}")
    return with_values(recipe, values)


def settled(result: SearchResult) -> tuple[dict[str, Any], str]:
    """Return the values that a search settles on, and why: those of the first trial, which are the
    usual ones, unless others are clearly better.

    Raises TrainingError where no trial came to its end.
    """
    best = result.best
    if best is None or best.loss is None:
        raise TrainingError("No trial before the run came to its end; give --lr and --rank.")
    first = next(trial for trial in result.trials if trial.number == 0)
    tried = f"Of {len(result.trials)} short trials {in_words(best.values)} was best"
    if best.number == 0:
        return dict(best.values), f"{tried} (evaluation loss {best.loss:.4f}), the usual choice."
    beside = "which was not measured" if first.loss is None else f"{first.loss:.4f} with"
    usual = f"{beside} the usual {in_words(first.values)}"
    if first.state == "complete" and first.loss is not None:
        if best.loss > (1 - LITTLE) * first.loss:
            why = f"{tried}, but hardly: {best.loss:.4f}, {usual}, which is taken."
            return dict(first.values), why
    elif first.loss is not None:
        usual += f" at {max(first.losses)} % of its steps, where it made way"
    return dict(best.values), f"{tried}: evaluation loss {best.loss:.4f}, {usual}."
