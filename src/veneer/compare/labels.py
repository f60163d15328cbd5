"""What is compared, as data: a label, what it changes in a recipe, and one sentence about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from veneer.adapter.config import LoRA
from veneer.adapter.method import Method
from veneer.quant.settings import Bits


@dataclass(frozen=True)
class Label:
    """One row of a comparison: what it trains and how.

    name      as it is shown
    explained one sentence for readers of the table
    method    settings of `Method` that differ from the usual, `lora` of `LoRA`
    run       name of its runs, which labels that train alike share
    """

    name: str
    explained: str
    method: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    bits: Bits | None = None
    lora_plus_ratio: float | None = None
    run: str = ""

    def __post_init__(self) -> None:
        if not self.run:
            object.__setattr__(self, "run", self.name)

    @property
    def trains_together(self) -> bool:
        """Whether its runs can share passes with others: low-rank ones over the base as it is."""
        return bool(self.lora) and self.bits is None

    @property
    def what_trains(self) -> LoRA | Method:
        """The adapter, or the method that has none."""
        return LoRA(**self.lora) if self.lora else Method(**self.method)


_ALL = (
    Label(
        "full",
        "Every weight of the base trains, and each task is a whole model of its own.",
        method={"method": "full"},
    ),
    Label(
        "freeze",
        "The last two blocks train, as the base's own weights; all below them stays.",
        method={"method": "freeze", "trained_blocks": 2},
    ),
    Label(
        "lora",
        "LoRA of rank 8 on all linear layers: W stays, and B A beside it trains.",
        lora={"rank": 8, "targets": "all"},
    ),
    Label(
        "qlora",
        "The same LoRA over a base whose linear layers are quantized to 4 bits (NF4).",
        lora={"rank": 8, "targets": "all"},
        bits=4,
    ),
    Label(
        "dora",
        "LoRA for the direction of each row of W, and a trained magnitude beside it.",
        lora={"rank": 8, "targets": "all", "dora": True},
    ),
    Label(
        "lora+",
        "The same LoRA, in which B learns eight times as fast as A.",
        lora={"rank": 8, "targets": "all"},
        lora_plus_ratio=8.0,
    ),
    Label(
        "rslora",
        "The same LoRA, scaled by alpha / √rank instead of alpha / rank: 2.8 times as much here.",
        lora={"rank": 8, "targets": "all", "rslora": True},
    ),
    Label(
        "prefix",
        "Keys and values of 20 virtual tokens train in every layer; the base reads them first.",
        method={"method": "prefix"},
    ),
    Label(
        "prompt",
        "Embeddings of 20 virtual tokens train; the base reads them before every row.",
        method={"method": "prompt"},
    ),
)
LABELS: dict[str, Label] = {label.name: label for label in _ALL}
# The most virtual tokens that any of them puts in front of a row.
MOST_VIRTUAL = max(Method(**label.method).virtual_tokens or 0 for label in _ALL)
BASE = Label("base", "The base as it is, without training.")


def swept(ranks: Sequence[int], target_sets: Sequence[str]) -> tuple[Label, ...]:
    """Return LoRA of each rank on all layers, and of rank 8 on each set of targets.

    Scaling stays 2, as alpha is twice the rank. Duplicates are dropped.
    """
    asked = [(rank, "all") for rank in ranks] + [(8, targets) for targets in target_sets]
    return tuple(_lora(rank, targets) for rank, targets in dict.fromkeys(asked))


def _lora(rank: int, targets: str) -> Label:
    where = "all linear layers" if targets == "all" else targets
    settings = {"rank": rank, "targets": targets}
    usual = LABELS["lora"]
    name = f"rank {rank}, {targets}"
    return replace(
        usual,
        name=name,
        explained=f"LoRA of rank {rank} (alpha {2 * rank}) on {where}.",
        lora=settings,
        run=usual.run if settings == usual.lora else name,
    )
