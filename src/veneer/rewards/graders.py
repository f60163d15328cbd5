"""OpenAI's graders as rewards: comparisons of texts, and formulas over them. No code of whoever
wrote one runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from veneer.errors import MOST_PROBLEMS, ConfigError, joined, listed, nearest, shortened
from veneer.rewards.formula import Formula, formula_of
from veneer.rewards.judged import Answered, RewardFault
from veneer.rewards.similarity import METRICS, MOST_CHARACTERS
from veneer.rewards.template import Field, Lacking, Template, template_of

OPERATIONS = {
    "eq": lambda ours, theirs: ours == theirs,
    "ne": lambda ours, theirs: ours != theirs,
    "like": lambda ours, theirs: theirs in ours,
    "ilike": lambda ours, theirs: theirs.casefold() in ours.casefold(),
}
KEYS = {
    "string_check": ("type", "name", "input", "reference", "operation"),
    "text_similarity": ("type", "name", "input", "reference", "evaluation_metric"),
    "multi": ("type", "name", "graders", "calculate_output"),
}
# What OpenAI has beside these, and why it is not here.
_CODE = "it runs a client's code, which never runs here"
_MODEL = "it asks another model, and none is asked here"
REFUSED = {
    "python": _CODE,
    "endpoint": "it calls another server, and none is called from here",
    "score_model": _MODEL,
    "label_model": _MODEL,
}
NO_METRICS = {
    "cosine": "it asks a model for embeddings",
    "bleu": "its usual forms differ, and say nothing of single sentences",
    "gleu": "its usual forms differ",
    "meteor": "it needs a dictionary of synonyms",
}
MOST_GRADERS = 32  # of a multi
MOST_OF_NAME = 200  # characters; each step's numbers have it
MOST_OF_ALL = 50_000  # characters of a grader as JSON; whoever looks at jobs gets it of each


class Grader(Protocol):
    """What a grader does. fields: what a row must have for it."""

    @property
    def name(self) -> str: ...

    @property
    def fields(self) -> frozenset[Field]: ...

    def grade(self, item: Mapping[str, Any], answer: str) -> float: ...


@dataclass(frozen=True)
class _Comparison:
    """What grades two texts of a row and its answer."""

    name: str
    input: Template
    reference: Template

    @property
    def fields(self) -> frozenset[Field]:
        return frozenset((*self.input.fields, *self.reference.fields))

    def texts(self, item: Mapping[str, Any], answer: str) -> tuple[str, str]:
        return self.input.fill(item, answer), self.reference.fill(item, answer)


@dataclass(frozen=True)
class StringCheck(_Comparison):
    """1 where two texts are equal (eq) or not (ne), or the first one has the second one in it, with
    regard to case (like) or without (ilike)."""

    operation: str

    def grade(self, item: Mapping[str, Any], answer: str) -> float:
        return float(OPERATIONS[self.operation](*self.texts(item, answer)))


@dataclass(frozen=True)
class TextSimilarity(_Comparison):
    """How alike two texts are."""

    metric: str
    most: int = MOST_CHARACTERS  # of each text that are compared

    def grade(self, item: Mapping[str, Any], answer: str) -> float:
        ours, theirs = self.texts(item, answer)
        return METRICS[self.metric](ours[: self.most], theirs[: self.most])


@dataclass(frozen=True)
class Multi:
    """A formula over other graders, each by its key."""

    name: str
    graders: Mapping[str, Grader]
    formula: Formula

    @property
    def fields(self) -> frozenset[Field]:
        return frozenset().union(*(each.fields for each in self.graders.values()))

    def grade(self, item: Mapping[str, Any], answer: str) -> float:
        return self.of(grades(self, item, answer))

    def of(self, values: Mapping[str, float]) -> float:
        """Return what the formula makes of grades. Raises RewardFault where that is no number."""
        try:
            value, why = self.formula(values), "it is infinite"
        except (ArithmeticError, ValueError) as error:
            value, why = math.nan, str(error)
        if not math.isfinite(value):
            of = f"{self.formula.text} is no number for {dict(values)}"
            raise RewardFault("not a finite number", f"{of}: {why}.")
        return value


def grades(grader: Multi, item: Mapping[str, Any], answer: str) -> dict[str, float]:
    """Return what each grader of a formula gives, 0 where the answer has not what it reads."""
    return {key: grade(each, item, answer) for key, each in grader.graders.items()}


def grade(grader: Grader, item: Mapping[str, Any], answer: str) -> float:
    """Return a grade, 0 where the answer is no JSON, or has not what is read of it.

    Raises RewardFault where the row has not, or where a formula gives no number.
    """
    try:
        return grader.grade(item, answer)
    except Lacking as lacking:
        if lacking.field.root == "sample":
            return 0.0
        raise RewardFault("raised", f"the row has no {lacking.field}.") from lacking


@dataclass(frozen=True)
class Graded:
    """A grader as a reward."""

    grader: Grader

    @property
    def name(self) -> str:
        return self.grader.name

    def __call__(self, answer: Answered) -> float:
        return grade(self.grader, answer.item, answer.text)

    def lacks(self, item: Mapping[str, Any]) -> str:
        """Return what a row has not that the grader reads; nothing where it has all."""
        missing = []
        for field in sorted(self.grader.fields, key=str):
            try:
                field.text_in({"item": item})
            except Lacking:
                missing.append(str(field))
        if not missing:
            return ""
        has = listed(map(str, item), most=9)
        return f"the row has no {listed(missing, most=9)}, which {self.name} reads; it has {has}"

    def close(self) -> None:
        """There is nothing to end."""


def read_grader(path: Path) -> Graded:
    """Return the grader of a file. Raises ConfigError where there is none in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} holds no grader: {error}.") from error
    return Graded(grader_of(value))


def grader_of(value: object) -> Grader:
    """Return the grader that a JSON value describes. Raises ConfigError with all that is wrong."""
    try:
        # Half characters, which JSON can say, could be sent back to nobody.
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        why = "This grader cannot be used: it has half a character (a lone surrogate)."
        raise ConfigError(why) from None
    except RecursionError:
        raise ConfigError("This grader cannot be used: it is nested too deeply.") from None
    if len(text) > MOST_OF_ALL:
        has = f"it has {len(text):,} characters, and may have {MOST_OF_ALL:,}"
        raise ConfigError(f"This grader cannot be used: {has}.")
    reading = _Reading()
    grader = reading.grader(value, "grader")
    if grader is None or reading.problems:
        raise ConfigError(f"This grader cannot be used: {joined(reading.problems)}.")
    return grader


def _no_slower_than_one(graders: Mapping[str, Grader]) -> dict[str, Grader]:
    """Return graders whose similarities together take the time that one may: it grows with the
    square of the characters that are compared."""
    count = sum(isinstance(each, TextSimilarity) for each in graders.values())
    most = math.isqrt(MOST_CHARACTERS**2 // max(1, count))
    return {
        key: replace(each, most=most) if isinstance(each, TextSimilarity) else each
        for key, each in graders.items()
    }


class _Reading:
    """Reads a grader, and keeps all that is wrong with it."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def grader(self, value: object, where: str, *, within: bool = False) -> Grader | None:
        """Return a grader, None where it cannot be one. within: whether it is of a multi."""
        kind = value.get("type") if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping) or not isinstance(kind, str):
            self.problems.append(f"{where} must be an object with a type")
            return None
        if kind in REFUSED:
            self.problems.append(f"{where} is of the type {kind}: {REFUSED[kind]}")
            return None
        known = [each for each in KEYS if not (within and each == "multi")]
        if kind not in known:
            which = f"{where}.type is {shortened(kind, 40)!r}, and may be {listed(known, most=9)}"
            self.problems.append(which + nearest(kind, known))
            return None
        before = len(self.problems)
        self._keys(value, KEYS[kind], where)
        name = self._text(value, "name", where)
        if len(name) > MOST_OF_NAME:
            may = f"may have {MOST_OF_NAME}"
            self.problems.append(f"{where}.name has {len(name):,} characters, and {may}")
        if kind == "multi":
            grader: Grader | None = self._multi(value, name, where)
        else:
            grader = self._comparison(value, kind, name, where)
        return grader if len(self.problems) == before else None

    def _comparison(self, value: Mapping[str, Any], kind: str, name: str, where: str) -> Grader:
        ours, theirs = (self._template(value, key, where) for key in ("input", "reference"))
        key = KEYS[kind][-1]
        choice = self._text(value, key, where)
        choices = OPERATIONS if kind == "string_check" else METRICS
        if choice in NO_METRICS and kind == "text_similarity":
            of = f"there are {listed(METRICS, most=9)}"
            self.problems.append(f"{where}.{key} {choice} is not here: {NO_METRICS[choice]}; {of}")
        elif choice and choice not in choices:
            may = f"and may be {listed(choices, most=9)}{nearest(choice, choices)}"
            self.problems.append(f"{where}.{key} is {shortened(choice, 40)!r}, {may}")
        if kind == "string_check":
            return StringCheck(name, ours, theirs, choice)
        return TextSimilarity(name, ours, theirs, choice)

    def _multi(self, value: Mapping[str, Any], name: str, where: str) -> Grader | None:
        graders: dict[str, Grader] = {}
        given = dict(self._each_of(value.get("graders"), f"{where}.graders"))
        for key, each in given.items():
            grader = self.grader(each, f"{where}.graders.{shortened(key, 40)}", within=True)
            if grader is not None:
                graders[key] = grader
        text, place = self._text(value, "calculate_output", where), f"{where}.calculate_output"
        if not text:
            return None
        try:
            formula = formula_of(text)
        except ValueError as error:
            self.problems.append(f"{place}: {error}")
            return None
        for unknown in sorted(formula.names - given.keys()):
            guess = self._guess(unknown, given)
            self.problems.append(f"{place} reads {unknown!r}, which no grader is{guess}")
        return Multi(name, _no_slower_than_one(graders), formula)

    def _each_of(self, value: object, where: str) -> Iterator[tuple[str, object]]:
        """Yield the graders of a formula, each with its name there."""
        if not isinstance(value, Mapping) or not value:
            self.problems.append(f"{where} must be graders, each by a name")
        elif isinstance(value.get("type"), str):  # one alone, as OpenAI's types have it
            yield str(value.get("name", "")), value
        elif len(value) > MOST_GRADERS:
            self.problems.append(f"{where} are {len(value)}, and may be {MOST_GRADERS}")
        else:
            yield from ((str(key), each) for key, each in value.items())

    def _keys(self, value: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
        for key in value:
            if key not in known:
                guess = self._guess(str(key), known)
                self.problems.append(f"{where}.{shortened(str(key), 40)} is not known{guess}")

    def _guess(self, name: str, names: Iterable[str]) -> str:
        """Return what was meant, while the problem is one of those that are shown: a client may
        send a hundred thousand."""
        return nearest(name, names) if len(self.problems) < MOST_PROBLEMS else ""

    def _text(self, value: Mapping[str, Any], key: str, where: str) -> str:
        text = value.get(key)
        if isinstance(text, str) and text.strip():
            return text
        self.problems.append(f"{where}.{key} must be a text")
        return ""

    def _template(self, value: Mapping[str, Any], key: str, where: str) -> Template:
        text = value.get(key)
        try:
            if isinstance(text, str):
                return template_of(text)
            self.problems.append(f"{where}.{key} must be a text")
        except ValueError as error:
            self.problems.append(f"{where}.{key}: {error}")
        return Template(())
