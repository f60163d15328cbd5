"""The description of an adapter: a frozen, validated value that imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar

from veneer.adapter.patterns import ByPath, pattern_problems
from veneer.checks import (
    ABOVE_0,
    BOOLEAN,
    NUMBER,
    Rule,
    at_least,
    broken,
    check_config,
    one_of,
    whole_number,
)
from veneer.errors import ConfigError

Init = Literal["auto", "kaiming", "gaussian", "pissa", "olora", "lora_ga", "loftq"]
Value = TypeVar("Value")
LARGEST_RANK_OR_ALPHA = 2**31  # a file can name numbers that no arithmetic here holds
RANK = whole_number(1, most=LARGEST_RANK_OR_ALPHA)
TOKEN = whole_number(0, most=LARGEST_RANK_OR_ALPHA)
IDS = re.compile(r"\[\s*[0-9]{1,18}\s*(,\s*[0-9]{1,18}\s*)*\]")  # of tokens, as JSON has them
ALPHA = Rule(
    lambda value: ABOVE_0.holds(value) and value <= LARGEST_RANK_OR_ALPHA,
    f"a number above 0 and at most {LARGEST_RANK_OR_ALPHA}",
)
KINDS = {
    **dict.fromkeys(
        ("rank_pattern", "alpha_pattern"), Rule(lambda value: isinstance(value, dict), "a map")
    ),
    "targets": Rule(lambda value: all(isinstance(name, str) for name in value), "names"),
    "invocation": Rule(
        lambda value: (
            bool(value)
            and isinstance(value, str | tuple)
            and (isinstance(value, str) or all(map(TOKEN.holds, value)))
        ),
        "a text, or the ids of its tokens",
    ),
    "layers": Rule(lambda value: isinstance(value, str), "slices"),
    "dropout": NUMBER,
    **dict.fromkeys(("rslora", "dora", "lora_fa", "shared_expert_a"), BOOLEAN),
}


@dataclass(frozen=True)
class LoRA:
    """How a low-rank adapter is attached to a base: y = W x + scaling · B (A x).

    `scaling` is alpha / rank, or alpha / √rank with `rslora` (Kalajdzievski, arXiv 2312.03732).
    Patterns map a regular expression that matches the end of a layer's path to a rank or an alpha
    of its own; the first that matches wins. `attach` adds a pattern for each stack of experts to
    which none gives a rank. One alpha is for all: a lower rank over experts has a larger scaling,
    as in PEFT, so that the learning rate that suits one rank suits the other.

    Raises ConfigError, which lists everything that is wrong at once.
    """

    rank: int = 8
    """Rank of the update: each adapted layer gets A (rank, in) and B (out, rank). `veneer tune
    --rank auto` chooses it by a short search before the run."""
    alpha: float | None = None
    """Strength of the update; scaling is alpha / rank. Twice the rank unless given."""
    dropout: float = 0.0
    """Share of the adapter's inputs that are zeroed at random while training."""
    targets: str | Sequence[str] = "attention"
    """Layers to adapt: attention, qv, mlp, all, or names, suffixes and re:patterns."""
    layers: str | None = None
    """Blocks to adapt, as slices: 0:12, or -4: (the last four), or 3,5,8:; all unless given."""
    rslora: bool = False
    """Scale by alpha / √rank, which keeps high ranks stable."""
    init: Init = "auto"
    """Start of A: kaiming, gaussian (0.01 · N(0, 1)), or auto: gaussian for MiniGPT alone. Of A and
    B: pissa, olora (from W), lora_ga (its gradient), loftq (what --bits rounded away)."""
    dora: bool = False
    """DoRA: train the length of each row of W + B A beside its direction."""
    lora_fa: bool = False
    """LoRA-FA: leave the random factor, A (B of an embedding), as it starts; train the other."""
    invocation: str | Sequence[int] | None = None
    """Activated LoRA: act from this text on, where a row has it last, and not before. Tokens before
    it are the base's own, so that a server computes them once for all. As "[5, 9]", token ids."""
    expert_rank: int | None = None
    """Rank over each expert of a mixture; rank / number of experts, at least 1, unless given."""
    shared_expert_a: bool = False
    """Give the experts of a stack one A (rank, in) for all, and each a B of its own."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of single layers, as a pattern of the path's end to a rank."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas of single layers, as a pattern of the path's end to an alpha."""

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            names = tuple(name.strip() for name in split_names(self.targets) if name.strip())
        elif isinstance(self.targets, Iterable):
            names = tuple(self.targets)
        else:
            names = (self.targets,)  # which is no text, and so refused
        object.__setattr__(self, "targets", names)
        object.__setattr__(self, "invocation", _invocation(self.invocation))
        self._check()
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.rank)

    def _check(self) -> None:
        opening = "This adapter cannot be"
        # Only files bring values of a wrong kind, of which nothing else can be asked.
        check_config(self, opening=opening, rules=KINDS)
        problems = [
            *broken(RANK, _entries("rank_pattern", self.rank_pattern)),
            *broken(ALPHA, _entries("alpha_pattern", self.alpha_pattern)),
            *pattern_problems((*self.rank_pattern, *self.alpha_pattern)),
        ]
        check_config(
            self,
            opening=opening,
            rules={
                "rank": RANK,
                "expert_rank": RANK,
                "alpha": ALPHA,
                "dropout": at_least(0, below=1),
                "init": one_of(Init),
            },
            contradictions={
                "targets is empty; name layers or a preset such as attention": not self.targets,
                "dora scales outputs of W before an invocation too; leave one of them out": (
                    self.dora and self.invocation is not None
                ),
            },
            problems=problems,
        )

    @property
    def invocation_tokens(self) -> tuple[int, ...]:
        """The ids of the invocation's tokens; none where the adapter acts on all tokens.

        Raises ConfigError for a text, which `adapter/invocation.py` makes tokens of.
        """
        if isinstance(self.invocation, str):
            raise ConfigError(
                f"The invocation {self.invocation!r} is a text; give its token ids, or a tokenizer."
            )
        return tuple(self.invocation or ())

    @property
    def has_start(self) -> bool:
        """Whether A and B start elsewhere than at zero, so that B A − B₀ A₀ is what is added."""
        return self.init in ("pissa", "olora", "lora_ga")

    @property
    def starts_at_base(self) -> bool:
        """Whether a new adapter leaves every output as it was, to the bit."""
        return self.init in ("auto", "kaiming", "gaussian")

    def rank_of(self, path: str) -> int:
        """Return the rank for the layer at `path`."""
        return self._ranks.of(path)

    def alpha_of(self, path: str) -> float:
        """Return the alpha for the layer at `path`."""
        return self._alphas.of(path)

    def scaling_of(self, path: str) -> float:
        """Return alpha / rank, or alpha / √rank with rsLoRA, for the layer at `path`."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (rank**0.5 if self.rslora else rank)

    @cached_property
    def _ranks(self) -> ByPath[int]:
        return ByPath(self.rank_pattern, self.rank)

    @cached_property
    def _alphas(self) -> ByPath[float]:
        assert self.alpha is not None
        return ByPath(self.alpha_pattern, self.alpha)


def _invocation(given: object) -> object:
    """Return ids as a tuple, be they in a sequence or in a text."""
    if isinstance(given, str) and IDS.fullmatch(given):
        given = [int(token) for token in given.strip("[]").split(",")]
    is_sequence = isinstance(given, Sequence) and not isinstance(given, str)
    return tuple(given) if is_sequence else given  # type: ignore[arg-type]


def split_names(targets: str) -> list[str]:
    """Return the names between commas; a pattern, as in re:q{1,2}, is one name."""
    return [targets] if targets.startswith("re:") else targets.split(",")


def _entries(field_name: str, pattern: Mapping[str, Value]) -> dict[str, Value]:
    return {f"{field_name}[{key!r}]": value for key, value in pattern.items()}
