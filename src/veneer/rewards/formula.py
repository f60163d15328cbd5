"""A formula over named numbers: parsed here, and never run as code."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from veneer.errors import nearest, shortened

MOST_CHARACTERS = 1000
MOST_DEPTH = 50  # of brackets and signs within each other
_TOKEN = re.compile(r"\s*(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+|[A-Za-z_]\w*|\*\*|\S)")
Compute = Callable[[Mapping[str, float]], float]
Binary = Callable[[float, float], float]


def _power(base: float, exponent: float) -> float:
    return math.pow(base, exponent)  # which raises where ** would give a complex number


# By how closely they bind; those of one row are computed from left to right.
_SUMS: Mapping[str, Binary] = {"+": operator.add, "-": operator.sub}
_PRODUCTS: Mapping[str, Binary] = {"*": operator.mul, "/": operator.truediv}
_POWERS = ("^", "**")
_OF_SEVERAL: Mapping[str, Callable[[list[float]], float]] = {"min": min, "max": max}
_OF_ONE: Mapping[str, Callable[[float], float]] = {
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
FUNCTIONS = (*_OF_SEVERAL, *_OF_ONE)


@dataclass(frozen=True)
class Formula:
    """What a text computes; names: the numbers that it reads."""

    text: str
    names: frozenset[str]
    _compute: Compute = field(repr=False, compare=False)

    def __call__(self, values: Mapping[str, float]) -> float:
        """Return its value. Raises ArithmeticError and ValueError where there is none."""
        return float(self._compute(values))


def formula_of(text: str) -> Formula:
    """Return a text as a formula: numbers, names, + - * / ^, brackets, and FUNCTIONS.

    Raises ValueError, saying what is wrong with it.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, and may have {MOST_CHARACTERS:,}")
    parser = _Parser(text)
    compute = parser.sum()
    if parser.token is not None:
        raise ValueError(f"{parser.token!r} is not expected there")
    return Formula(text, frozenset(parser.names), compute)


class _Parser:
    """Reads a formula from left to right; `token` is what comes next, None at the end."""

    def __init__(self, text: str) -> None:
        self._tokens = iter([match[1] for match in _TOKEN.finditer(text)])
        self.token = next(self._tokens, None)
        self.names: set[str] = set()
        self._depth = 0

    def sum(self) -> Compute:
        """product (+ or - product)*"""
        return self._left_to_right(_SUMS, lambda: self._left_to_right(_PRODUCTS, self._signed))

    def _left_to_right(
        self, operators: Mapping[str, Binary], operand: Callable[[], Compute]
    ) -> Compute:
        first, rest = operand(), list[tuple[Binary, Compute]]()
        while self.token in operators:
            rest.append((operators[self._take()], operand()))
        return _one_after_another(first, rest) if rest else first

    def _signed(self) -> Compute:
        """-signed, or a power: -2 ^ 2 is -(2 ^ 2)."""
        if self.token in ("-", "+"):
            sign = -1.0 if self._take() == "-" else 1.0
            with self:
                operand = self._signed()
            return lambda values: sign * operand(values)
        base = self._atom()
        if self.token in _POWERS:
            self._take()
            with self:
                return _both(_power, base, self._signed())  # 2 ^ 3 ^ 2 is 2 ^ (3 ^ 2)
        return base

    def _atom(self) -> Compute:
        token = self._take()
        if token == "(":
            with self:
                inner = self.sum()
            self._expect(")")
            return inner
        if token[0].isdecimal() or (token[0] == "." and len(token) > 1):
            number = float(token)
            return lambda values: number
        if not (token[0].isalpha() or token[0] == "_"):
            raise ValueError(f"{token!r} is not expected there")
        if self.token == "(":
            return self._call(token)
        self.names.add(token)
        return lambda values: values[token]

    def _call(self, name: str) -> Compute:
        if name not in FUNCTIONS:
            known = ", ".join(FUNCTIONS)
            guess = nearest(name, FUNCTIONS)
            raise ValueError(f"{shortened(name, 40)} is none of the functions {known}{guess}")
        self._expect("(")
        with self:
            arguments = [self.sum()]
            while self.token == ",":
                self._take()
                arguments.append(self.sum())
        self._expect(")")
        if name in _OF_SEVERAL:
            of_several = _OF_SEVERAL[name]
            return lambda values: of_several([each(values) for each in arguments])
        if len(arguments) > 1:
            raise ValueError(f"{name} takes one number, not {len(arguments)}")
        of_one, (argument,) = _OF_ONE[name], arguments
        return lambda values: of_one(argument(values))

    def _take(self) -> str:
        token = self.token
        if token is None:
            raise ValueError("it ends too early")
        self.token = next(self._tokens, None)
        return token

    def _expect(self, token: str) -> None:
        if self.token != token:
            place = f"before {self.token!r}" if self.token else "at the end"
            raise ValueError(f"{token!r} is expected {place}")
        self._take()

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise ValueError(f"it has more than {MOST_DEPTH} brackets within each other")

    def __exit__(self, *error: object) -> None:
        self._depth -= 1


def _one_after_another(first: Compute, rest: list[tuple[Binary, Compute]]) -> Compute:
    """Return a chain as a loop; calls within calls, one for each term, might be too deep."""

    def compute(values: Mapping[str, float]) -> float:
        value = first(values)
        for each, operand in rest:
            value = each(value, operand(values))
        return value

    return compute


def _both(operator: Binary, left: Compute, right: Compute) -> Compute:
    return lambda values: operator(left(values), right(values))
