"""Numbers that carry the formula they come from."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Term:
    """A product: its value is that of its factors, and its text names each of them.

    Term.of(30, "layers", 2048, "tokens", 2, "bytes") reads "30 layers × 2,048 tokens × 2 bytes".
    A factor without a unit has an empty name.
    """

    factors: tuple[tuple[float, str], ...]
    note: str = ""

    @classmethod
    def of(cls, *factors: float | str, note: str = "") -> Term:
        """Return the product of alternating numbers and names, with a note on what it is."""
        return cls(tuple(zip(factors[::2], factors[1::2], strict=True)), note)  # type: ignore[arg-type]

    def times(self, count: float, name: str) -> Term:
        """Return the product with one more factor in front."""
        return Term(((count, name), *self.factors), self.note)

    @property
    def value(self) -> int:
        return round(prod(number for number, _ in self.factors))

    @property
    def text(self) -> str:
        named = [f"{_short(number)} {name}" for number, name in self.factors if name or number != 1]
        product = " × ".join(factor.strip() for factor in named)
        return f"{product} ({self.note})" if self.note else product


@dataclass(frozen=True)
class Amount:
    """A named sum of products."""

    name: str
    terms: tuple[Term, ...]

    @property
    def value(self) -> int:
        return sum(term.value for term in self.terms)

    @property
    def formula(self) -> str:
        """The sum as text, one product a line."""
        return "\n".join(("" if i == 0 else "+ ") + term.text for i, term in enumerate(self.terms))


def amount(name: str, *terms: Term) -> Amount:
    """Return the sum of those products that are not zero."""
    return Amount(name, tuple(term for term in terms if term.value))


def _short(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) else f"{number:,.4f}"
