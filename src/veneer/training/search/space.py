"""What a search varies: settings of tune, each with its range or its values. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any, TypeAlias

from veneer.adapter.config import LoRA
from veneer.errors import ConfigError, VeneerError, joined, nearest
from veneer.training.config import NOT_OF_THE_COURSE, TrainConfig
from veneer.training.recipe import Recipe

Value: TypeAlias = str | int | float | bool
Over: TypeAlias = Mapping[str, str | Sequence[Value]]

# How long a trial is, and when it is measured, is the same for all of them.
OF_ALL_TRIALS = ("epochs", "steps", "eval_every", "patience")
MAPS = ("rank_pattern", "alpha_pattern")  # which no list of values can hold
LOG_FROM = 10  # a range that ends at this many times its beginning is searched by orders
BETWEEN = ".."
JOINED = "+"  # between the names of one value, as in targets=q_proj+v_proj,all


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`; by their logarithm, or whole ones alone."""

    low: float
    high: float
    log: bool
    whole: bool

    @property
    def bounds(self) -> tuple[Value, ...]:
        """Values that the range has, for a check: its two ends."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)

    def holds(self, value: object) -> bool:
        """Return whether a value is in the range."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.low <= float(str(value)) <= self.high


@dataclass(frozen=True)
class Values:
    """A few values, in no order."""

    bounds: tuple[Value, ...]

    def holds(self, value: object) -> bool:
        """Return whether a value is one of them."""
        return value in self.bounds


Space: TypeAlias = Mapping[str, Range | Values]


def space_of(over: Over, recipe: Recipe) -> dict[str, Range | Values]:
    """Return what a search of `recipe` varies, by the names of settings.

    over: for each a range as in 1e-4..3e-3, values as in 4,8,16, or a sequence of values.
    Raises ConfigError for everything that is wrong with it.
    """
    of_lora = {field.name: str(field.type) for field in fields(LoRA)}
    of_training = {field.name: str(field.type) for field in fields(TrainConfig)}
    types = of_lora | of_training
    for name in (*NOT_OF_THE_COURSE, *OF_ALL_TRIALS, *MAPS):
        types.pop(name, None)
    problems: list[str] = []
    space: dict[str, Range | Values] = {}
    for key, spec in over.items():
        name = key.strip().removeprefix("--").replace("-", "_")
        if name in OF_ALL_TRIALS:
            problems.append(f"{name} is the same for all trials; give --{name.replace('_', '-')}")
        elif name not in types:
            problems.append(f"{name!r} cannot be varied{nearest(name, types)}")
        elif name in space:
            problems.append(f"{name} is given twice")
        else:
            try:
                space[name] = _range_or_values(name, spec, types[name])
            except ConfigError as error:
                problems.append(str(error))
    for name, each in space.items():
        for value in each.bounds:
            try:
                with_values(recipe, {name: value})
            except VeneerError as error:
                problems.append(f"{name}={value}: {str(error).removesuffix('.')}")
    if not over:
        problems.append("nothing is varied; give --over, as in --over lr=1e-4..3e-3")
    if problems:
        raise ConfigError(f"There can be no such search: {joined(problems)}.")
    return space


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return a recipe with other values of settings. Alpha stays in proportion to the rank where it
    is twice that, as it is unless given."""
    names = {field.name for field in fields(LoRA)}
    own: dict[str, Any] = {name: value for name, value in values.items() if name in names}
    if "rank" in own and "alpha" not in own and recipe.lora.alpha == 2 * recipe.lora.rank:
        own["alpha"] = None
    if isinstance(targets := own.get("targets"), str):
        own["targets"] = (targets,) if targets.startswith("re:") else tuple(targets.split(JOINED))
    course = {name: value for name, value in values.items() if name not in names}
    return replace(
        recipe,
        lora=replace(recipe.lora, **own),
        training=replace(recipe.training, **course),
    )


def grid_of(space: Space, *, most: int) -> list[dict[str, Value]]:
    """Return all combinations of values, the last setting's fastest. Raises ConfigError for a range
    of a setting, and for more than so many combinations."""
    if ranges := [name for name, each in space.items() if isinstance(each, Range)]:
        raise ConfigError(
            f"A grid is of values: give those of {', '.join(ranges)} as A,B,C, or another sampler."
        )
    if (count := math.prod(len(each.bounds) for each in space.values())) > most:
        raise ConfigError(
            f"A grid of these values is {count:,} trials; give --trials {count}, fewer values, or "
            "another sampler."
        )
    return _combinations(space)


def few_of(space: Space, *, most: int) -> list[dict[str, Value]]:
    """Return all combinations of values where they are no more than so many, of which a sampler
    would draw some again; else none."""
    few: dict[str, Values] = {}
    for name, each in space.items():
        if isinstance(each, Values):
            few[name] = each
        elif each.whole and each.high - each.low < most:
            few[name] = Values(tuple(range(int(each.low), int(each.high) + 1)))
        else:
            return []
    count = math.prod(len(each.bounds) for each in few.values())
    return _combinations(few) if count <= most else []


def _combinations(space: Space) -> list[dict[str, Value]]:
    return [
        dict(zip(space, values, strict=True))
        for values in product(*(each.bounds for each in space.values()))
    ]


def usual_values(recipe: Recipe, space: Space) -> dict[str, Value] | None:
    """Return the values that the recipe itself has, None where the search leaves one of them out.

    Of a setting that the recipe leaves open, the values are those that its run would choose, if
    `recipe` has them.
    """
    values = {}
    for name, each in space.items():
        group = recipe.lora if hasattr(recipe.lora, name) else recipe.training
        value = getattr(group, name)
        if name == "targets":
            value = JOINED.join(value)
        if not each.holds(value):
            return None
        values[name] = value
    return values


def in_words(values: Mapping[str, Any]) -> str:
    """Return "rank 8, lr 0.0004"."""
    texts = (f"{value:.3g}" if isinstance(value, float) else value for value in values.values())
    return ", ".join(f"{name} {text}" for name, text in zip(values, texts, strict=True))


def _range_or_values(name: str, spec: str | Sequence[Value], kind: str) -> Range | Values:
    """Return what one --over says. Raises ConfigError for what says nothing."""
    if not isinstance(spec, Sequence) or not all(isinstance(each, Value) for each in spec):
        raise ConfigError(
            f"{name} is {spec!r}; give a text, or a sequence of numbers, texts and truth values "
            f"(names of one value are joined, as in q_proj{JOINED}v_proj)"
        )
    kinds = {*kind.split(" | ")}
    is_text = not kinds & {"int", "float", "bool"}  # in which dots and numbers are of a name
    if not isinstance(spec, str):
        values: list[Value] = list(spec)
    elif BETWEEN in spec and not is_text:
        return _range(name, spec, whole="int" in kinds)
    else:
        texts = [text.strip() for text in spec.split(",") if text.strip()]
        values = [*texts] if is_text else [*map(_value, texts)]
    if not values:
        raise ConfigError(f"{name} has no values; give some, as in {name}=A,B, or a range, A..B")
    if "float" in kinds:
        values = [*_floats(values)]
    return Values(tuple(dict.fromkeys(values)))


def _range(name: str, spec: str, *, whole: bool) -> Range:
    low_text, _, high_text = spec.partition(BETWEEN)
    if high_text.startswith("."):  # of three dots, the last would make 0.3 of 3
        high_text = ""
    try:
        low, high = float(low_text), float(high_text)
    except ValueError:
        low = high = math.nan
    is_whole = low.is_integer() and high.is_integer()
    if not low < high or math.inf in (-low, high) or (whole and not is_whole):
        of = "whole numbers" if whole else "numbers"
        raise ConfigError(f"{name}={spec} is no range; give two {of}, the lower one first, as A..B")
    return Range(low, high, log=low > 0 and high >= LOG_FROM * low, whole=whole)


def _floats(values: Sequence[Value]) -> Iterator[Value]:
    for value in values:
        yield float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _value(text: str) -> Value:
    """Return the number, the truth value or the name that a text spells."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
