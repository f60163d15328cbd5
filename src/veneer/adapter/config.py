"""The description of an adapter: a frozen, validated value that imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar, get_args

from veneer.adapter.patterns import ByPath, faults
from veneer.errors import ConfigError, listed

Init = Literal["auto", "kaiming", "gaussian", "pissa", "olora", "lora_ga", "loftq"]
Value = TypeVar("Value")
LARGEST = 2**31  # rank or alpha; a file can name numbers that no arithmetic here holds


@dataclass(frozen=True)
class LoRA:
    """How a low-rank adapter is laid over a base: y = W x + scaling · B (A x).

    `scaling` is alpha / rank, or alpha / √rank with `rslora` (Kalajdzievski, arXiv 2312.03732).
    Patterns map a regular expression that matches the end of a layer's path to a rank or an alpha
    of its own; the first that matches wins.

    Raises ConfigError, which lists everything that is wrong at once.
    """

    rank: int = 8
    """Rank of the update: each adapted layer gets A (rank, in) and B (out, rank)."""
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
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of single layers, as a pattern of the path's end to a rank."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas of single layers, as a pattern of the path's end to an alpha."""

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            names = tuple(part.strip() for part in split_names(self.targets) if part.strip())
        else:
            names = tuple(self.targets)
        object.__setattr__(self, "targets", names)
        problems = self._problems()
        if problems:
            raise ConfigError(f"This adapter cannot be: {listed(problems)}.")
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.rank)

    def _problems(self) -> list[str]:
        # Only files can bring values of the wrong kind; nothing else can be said of those.
        problems = [
            f"{name} is {value!r}, but must be {rule}"
            for name, value, good, rule in (
                ("rank_pattern", self.rank_pattern, isinstance(self.rank_pattern, dict), "a map"),
                (
                    "alpha_pattern",
                    self.alpha_pattern,
                    isinstance(self.alpha_pattern, dict),
                    "a map",
                ),
                ("targets", self.targets, all(isinstance(t, str) for t in self.targets), "names"),
                ("layers", self.layers, isinstance(self.layers, str | None), "slices"),
                ("dropout", self.dropout, isinstance(self.dropout, int | float), "a number"),
                *(
                    (name, value, isinstance(value, bool), "true or false")
                    for name in ("rslora", "dora", "lora_fa")
                    for value in [getattr(self, name)]
                ),
            )
            if not good
        ]
        if problems:
            return problems
        for name, rank in {"rank": self.rank, **_named("rank_pattern", self.rank_pattern)}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                problems.append(f"{name} is {rank!r}, but must be a whole number of at least 1")
            elif rank > LARGEST:
                problems.append(f"{name} is far too large")
        alphas = _named("alpha_pattern", self.alpha_pattern)
        if self.alpha is not None:
            alphas["alpha"] = self.alpha
        for name, alpha in alphas.items():
            if not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
                problems.append(f"{name} is {alpha!r}, but must be a number above 0")
            elif alpha > LARGEST:
                problems.append(f"{name} is far too large")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout!r}, but must be at least 0 and below 1")
        if not self.targets:
            problems.append("targets is empty; name layers or a preset such as attention")
        if self.init not in get_args(Init):
            problems.append(
                f"init is {self.init!r}, but must be one of {', '.join(get_args(Init))}"
            )
        return problems + faults((*self.rank_pattern, *self.alpha_pattern))

    @property
    def has_start(self) -> bool:
        """Whether A and B start elsewhere than at zero, so that B A − B₀ A₀ is what is added."""
        return self.init in ("pissa", "olora", "lora_ga")

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


def split_names(targets: str) -> list[str]:
    """Return names that stand between commas; a pattern, as in re:q{1,2}, is one."""
    return [targets] if targets.startswith("re:") else targets.split(",")


def _named(field_name: str, pattern: Mapping[str, Value]) -> dict[str, Value]:
    return {f"{field_name}[{key!r}]": value for key, value in pattern.items()}
