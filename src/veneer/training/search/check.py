"""What is checked of a search before anything trains."""

from __future__ import annotations

from veneer.errors import Checks, ConfigError
from veneer.training.many.tune import EXTENDS
from veneer.training.preflight import Preflight, preflight
from veneer.training.recipe import Recipe
from veneer.training.rows import RunRows
from veneer.training.search.space import Space, Values, with_values


def check_kind(recipe: Recipe) -> None:
    """Raise ConfigError for a recipe whose runs cannot train together."""
    if recipe.method.method != "lora":
        raise ConfigError(
            f"A search is over low-rank adapters, and {recipe.method.method} is none."
        )
    if recipe.rows.new_words is not None:
        raise ConfigError(f"Trials share one base, and new_words {EXTENDS}")
    if recipe.training.context_parallel > 1 or recipe.training.replay_passes:
        raise ConfigError("Trials train together; context_parallel and replay_passes do not.")
    if recipe.objective.shape == "prompts":
        raise ConfigError(
            f"Trials train together, and {recipe.objective.objective} learns from samples of its "
            "own, which they do not draw together yet; compare runs of veneer tune instead."
        )


def check_held_out(rows: RunRows, space: Space) -> None:
    """Raise ConfigError where the losses of trials would not be those of the same held-out rows."""
    if not rows.held_out:
        raise ConfigError(
            "A search compares trials by rows that none of them learns. Hold some out by "
            "--eval-rows, or name others by --eval-data."
        )
    if "seed" in space and rows.ready.eval_data is None:
        raise ConfigError(
            "A seed decides which rows are held out, and losses on other rows tell no trial from "
            "another. To vary it, name the held-out rows by --eval-data."
        )


def checked_values(recipe: Recipe, space: Space) -> Preflight:
    """Check the recipe before its base is loaded, with each of the values that it may have."""
    checks = Checks("There can be no such search")

    def checked(values: dict[str, object], beside: Preflight | None) -> Preflight | None:
        with checks.check():
            return preflight(
                with_values(recipe, values),
                resume=False,
                force=True,  # of the trials before, which are asked for by their search
                ignore_space=True,  # trials write less than runs; each is checked as it begins
                beside=beside,
            )
        return None

    ahead = checked({}, None)
    for name, each in space.items():
        for value in each.bounds if ahead and isinstance(each, Values) else ():
            checked({name: value}, ahead)
    checks.end()
    assert ahead is not None
    return ahead
