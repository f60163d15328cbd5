"""What is compared and how: a frozen, validated value that imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from veneer.adapter.config import split_names
from veneer.checks import ABOVE_0, broken, check_config, one_of, whole_number
from veneer.compare.budget import Budget, parse_budget
from veneer.compare.labels import LABELS, Label, swept
from veneer.errors import ConfigError, nearest
from veneer.models.device_names import DEVICE
from veneer.training.choose import learning_rate
from veneer.training.recipe import DType

METHODS = ",".join(LABELS)


@dataclass(frozen=True)
class CompareConfig:
    """What is compared and how. Raises ConfigError, which lists everything that is wrong."""

    methods: str | Sequence[str] = METHODS
    """Methods to compare, of full, freeze, lora, qlora, dora, lora+, rslora, prefix, prompt."""
    ranks: str | Sequence[int] | None = None
    """For a second table, ranks of LoRA on all layers, as in 1,4,8,16,64; alpha is twice each."""
    target_sets: str | Sequence[str] | None = None
    """For the second table too, targets of LoRA of rank 8, as in qv,attention,mlp,all."""
    budget: str | None = None
    """What each method gets: steps:N, tokens:N or minutes:N (of training, by its own speed); the
    steps that `veneer tune` would choose unless given."""
    seeds: int = 1
    """Runs of each method; with several, losses come with their standard deviation."""
    seed: int = 0
    """Decides the start of what trains and the order of rows; further seeds count up from it."""
    test: Path | None = None
    """File of questions to answer: prompts with completions or lists of references."""
    test_rows: int | None = None
    """Ask only this many questions, the first ones."""
    max_new_tokens: int = 96
    """Longest answer, in tokens."""
    general: Path | None = None
    """Text on which to measure forgetting, instead of the sample that ships with Veneer."""
    eval_rows: int | None = None
    """Rows to hold out for the evaluation loss; a tenth unless given, at most 200."""
    limit: int | None = None
    """Use only this many rows of DATA, the first ones."""
    max_length: int = 1024
    """Longest row in tokens; the rest of a longer one is cut off."""
    tokens_per_step: int | None = None
    """Real tokens in an optimizer step, at most; chosen by how many there are unless given."""
    lr: dict[str, float] = field(default_factory=dict)
    """Learning rates of single methods, as in --lr.lora 5e-4, instead of those that
    `veneer tune` chooses."""
    range_test: bool = False
    """First try a third of each rate, the rate and three times it, for a tenth of the budget."""
    together: bool = False
    """Train the low-rank methods of a seed together, in passes over the base that they share: less
    time for all, but time and memory of a single one are not measured."""
    device: str = "auto"
    """Device to compute on: cpu, cuda, mps, xpu, or one of several as in cuda:1; auto takes an
    accelerator where there is one."""
    dtype: DType = "auto"
    """Number format to compute in; auto takes the faster one here, the same for all."""

    def __post_init__(self) -> None:
        for name in ("methods", "ranks", "target_sets"):
            value = getattr(self, name)
            items = split_names(value) if isinstance(value, str) else list(value or ())
            items = [item.strip() if isinstance(item, str) else item for item in items]
            object.__setattr__(self, name, tuple(dict.fromkeys(x for x in items if x != "")))
        ranks = [_rank(rank) for rank in self.ranks or ()]
        count = whole_number(1)
        problems = [
            f"the method {name!r} is unknown{nearest(str(name), LABELS)}"
            for name in self.methods
            if name not in LABELS
        ]
        if None in ranks:
            names = ", ".join(map(str, self.ranks or ()))
            problems.append(f"ranks is {names}, but must be whole numbers, each at least 1")
        object.__setattr__(self, "ranks", tuple(rank for rank in ranks if rank))
        try:
            self.allowed_of(1)
        except ConfigError as error:
            problems.append(str(error))
        problems += self._problems_of_rates()
        check_config(
            self,
            opening="Nothing can be compared so",
            rules={
                "seeds": count,
                "seed": whole_number(0),
                "test_rows": count,
                "max_new_tokens": count,
                "eval_rows": count,
                "limit": whole_number(2),
                "max_length": whole_number(2),
                "tokens_per_step": count,
                "device": DEVICE,
                "dtype": one_of(DType),
            },
            contradictions={
                "minutes are of a method's own training; give steps or tokens with together": (
                    self.together and (self.budget or "").startswith("minutes")
                ),
                "methods is empty; name at least one": not self.methods,
                "test_rows would do nothing without test": (
                    self.test_rows is not None and self.test is None
                ),
            },
            problems=problems,
        )

    def _problems_of_rates(self) -> list[str]:
        problems = []
        for name, rate in self.lr.items():
            if name not in LABELS:
                problems.append(
                    f"lr is given for {name!r}, which is unknown{nearest(name, LABELS)}"
                )
            elif name not in self.methods and not (name == "lora" and self.swept):
                problems.append(f"lr of {name} would do nothing, for {name} is not compared")
            else:
                problems += broken(ABOVE_0, {f"lr of {name}": rate})
        return problems

    @property
    def labels(self) -> tuple[Label, ...]:
        """The rows of the first table."""
        return tuple(LABELS[name] for name in self.methods)

    @property
    def swept(self) -> tuple[Label, ...]:
        """The rows of the second table, if any."""
        return swept([int(rank) for rank in self.ranks or ()], self.target_sets or ())

    def allowed_of(self, steps: int) -> Budget:
        """Return what every method gets, where `steps` are what a run chooses."""
        return Budget("steps", steps) if self.budget is None else parse_budget(self.budget)

    def rate_of(self, label: Label, hidden_size: int | None) -> float:
        """Return the learning rate at which a label trains, or from which a range test starts."""
        ratio = label.lora_plus_ratio
        usual = learning_rate(label.what_trains, hidden_size, lora_plus_ratio=ratio)
        return self.lr.get("lora" if label in self.swept else label.name, usual)


def _rank(value: object) -> int | None:
    """Return the rank that a value is or spells, None where it is none."""
    try:
        rank = int(str(value))
    except ValueError:
        return None
    return rank if rank >= 1 else None
