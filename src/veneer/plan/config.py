"""What is planned: a frozen, validated value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from veneer.errors import ConfigError
from veneer.fused.recompute import Recompute
from veneer.quant.settings import Bits

MethodName = Literal["full", "freeze", "lora", "dora", "qlora", "prefix", "prompt"]
DType = Literal["bf16", "float32"]
ADAPTING = ("lora", "dora", "qlora")  # methods that lay low-rank adapters over layers


@dataclass(frozen=True)
class PlanConfig:
    """How a model would train. Raises ConfigError, which lists everything that is wrong."""

    method: MethodName = "lora"
    """What trains: all, the last blocks, adapters (qlora over 4 bits), or virtual tokens."""
    bits: Bits | None = None
    """Bits a number in the frozen linear layers: 4 for qlora, else those of the dtype."""
    dtype: DType = "bf16"
    """Number format to compute in, and to hold all in that is not packed."""
    pack_head: bool = False
    """With 4 or 8 bits, pack the head too."""
    tokens_per_batch: int = 2048
    """Real tokens in one forward and backward pass."""
    max_length: int | None = None
    """Longest row in tokens, which is never cut in two; as long as a pass unless given."""
    recompute: Recompute = "none"
    """What is computed again instead of kept: nothing, inner projections, or whole layers."""
    trained_blocks: int = 2
    """Blocks that freeze trains, the last ones (as many as LLaMA-Factory does)."""
    train_head: bool = False
    """With freeze, train the output head too, and the embedding where the two are one weight."""
    train_norms: bool = False
    """With freeze, train the norms of all blocks too, and the last one."""
    virtual_tokens: int = 20
    """Virtual tokens of prefix and prompt."""
    prefix_mlp: int | None = None
    """With prefix, the width of an MLP that makes the keys and values while training."""
    mapped: bool = False
    """Count the weights as mapped from a directory that veneer quantize wrote: on the disk."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value!r}, but must be {', '.join(map(str, get_args(kind)))}"
            for name, value, kind in (
                ("method", self.method, MethodName),
                ("bits", self.bits, Bits),
                ("dtype", self.dtype, DType),
                ("recompute", self.recompute, Recompute),
            )
            if value is not None and value not in get_args(kind)
        ]
        problems += [
            f"{name} is {value!r}, but must be at least 1"
            for name in (
                "tokens_per_batch",
                "max_length",
                "trained_blocks",
                "virtual_tokens",
                "prefix_mlp",
            )
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if self.method in ("full", "freeze") and self.bits in (4, 8):
            problems.append(
                f"{self.method} trains weights, which cannot be held in {self.bits} bits"
            )
        if self.pack_head and self.base_bits not in (4, 8):
            problems.append("pack_head needs a base in 4 or 8 bits")
        if self.mapped and self.base_bits not in (4, 8):
            problems.append("mapped needs a base in 4 or 8 bits")
        if problems:
            raise ConfigError("This cannot be planned: " + "; ".join(problems) + ".")

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return self.max_length or self.tokens_per_batch

    @property
    def base_bits(self) -> int:
        """Bits a number in the frozen linear layers."""
        return self.bits or (4 if self.method == "qlora" else 8 * self.width)

    @property
    def width(self) -> int:
        """Bytes of a number in the dtype of computing."""
        return 4 if self.dtype == "float32" else 2
