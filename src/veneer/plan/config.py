"""The settings of a plan: a frozen, validated value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from veneer.checks import at_least, check_config, one_of
from veneer.fused.recompute import Recompute
from veneer.quant.settings import LoadBits, Offload

MethodName = Literal["full", "freeze", "lora", "dora", "qlora", "prefix", "prompt"]
DType = Literal["bf16", "float32"]
# AdamW with moments in float32, in 8 bits, or in 8 bits in memory that CUDA moves to the host.
OptimizerName = Literal["adamw", "adamw8bit", "paged-adamw8bit"]
ADAPTING = ("lora", "dora", "qlora")  # methods with low-rank adapters


@dataclass(frozen=True)
class PlanConfig:
    """How a model would train. Raises ConfigError, which lists everything that is wrong."""

    method: MethodName = "lora"
    """What trains: all, the last blocks, adapters (qlora over 4 bits), or virtual tokens."""
    bits: LoadBits | None = None
    """Bits a number in the frozen linear layers: 4 for qlora, else those that it is stored in;
    16 is dense, in the dtype."""
    dtype: DType = "bf16"
    """Number format to compute in, and of all weights that are not quantized."""
    pack_head: bool = False
    """With 4 or 8 bits, quantize the head too."""
    tokens_per_batch: int = 2048
    """Real tokens in one forward and backward pass."""
    max_length: int | None = None
    """Longest row in tokens, which is never cut in two; a whole pass unless given."""
    recompute: Recompute = "none"
    """What is computed again instead of kept: nothing, inner projections, or whole layers; disk
    keeps it there."""
    optimizer: OptimizerName = "adamw"
    """AdamW with moments in float32, in 8 bits, or in 8 bits that leave the card where it is full
    (paged)."""
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
    """Count the weights as on disk, mapped from a directory that veneer quantize wrote."""
    offload: Offload = "none"
    """Where the frozen base is while it is not used: on the device (none), in this machine's memory
    (cpu), or on its disk, from where blocks are copied to the device ahead of their use."""

    def __post_init__(self) -> None:
        count = at_least(1)
        check_config(
            self,
            opening="This cannot be planned",
            rules={
                "method": one_of(MethodName),
                "bits": one_of(LoadBits),
                "dtype": one_of(DType),
                "recompute": one_of(Recompute),
                "optimizer": one_of(OptimizerName),
                "tokens_per_batch": count,
                "max_length": count,
                "offload": one_of(Offload),
                "trained_blocks": count,
                "virtual_tokens": count,
                "prefix_mlp": count,
            },
            contradictions={
                f"{self.method} trains weights, which cannot be held in {self.bits} bits": (
                    self.method in ("full", "freeze") and self.bits in (4, 8)
                ),
                "qlora trains over 4 or 8 bits, not 16": self.method == "qlora" and self.bits == 16,
                "pack_head needs a base in 4 or 8 bits": (
                    self.pack_head and self.base_bits not in (4, 8)
                ),
                f"{self.method} trains the base's own weights, which cannot be offloaded": (
                    self.method in ("full", "freeze") and self.offload != "none"
                ),
                "mapped needs a base in 4 or 8 bits": (
                    self.mapped and self.base_bits not in (4, 8)
                ),
            },
        )

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return self.max_length or self.tokens_per_batch

    @property
    def base_bits(self) -> int:
        """Bits a number in the frozen linear layers."""
        bits = 4 if self.bits is None and self.method == "qlora" else self.bits
        return 8 * self.width if bits in (None, 16) else bits

    @property
    def width(self) -> int:
        """Bytes of a number in the dtype of computing."""
        return 4 if self.dtype == "float32" else 2
