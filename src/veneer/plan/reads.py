"""The weights of a mixture that a pass reads, which matters where they are mapped from the disk.

How many experts a pass reaches depends on the router. Under even routing, in which each token
takes k of E experts at random, it is E (1 - (1 - k / E)^tokens) in the mean; real routers favour
some experts and reach fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

from veneer.plan.activations import recompute_of
from veneer.plan.config import PlanConfig
from veneer.plan.memory import weight_terms
from veneer.plan.methods import Trained
from veneer.plan.sizes import Block, Sizes


@dataclass(frozen=True)
class Reads:
    """Bytes of weights that a pass reads, each way: those that every token needs (without the
    embedding, of which it reads a few rows), and those of experts.

    reached, experts_a_block: experts of a block that are reached, and all of them. ways: how often
    a pass reads them: forward, backward, and forward again where layers are computed again.
    """

    shared: int
    experts: int
    reached: float
    experts_a_block: int
    ways: int

    @property
    def bytes(self) -> int:
        return self.shared + self.experts


def reads(config: PlanConfig, sizes: Sizes, trained: Trained) -> Reads | None:
    """Return what a pass reads of a mixture under even routing, or None for any other model."""
    mixed = [block for block in sizes.blocks if block.routed]
    if not mixed:
        return None
    tokens, description = config.tokens_per_batch, sizes.description
    of_experts = {block: _expert_bytes(config, sizes, block) for block in mixed}
    quantized, rest = weight_terms(config, sizes)
    everything = sum(term.value for term in quantized + rest)
    embedding, head = description.embedding, description.head
    lookup = 0
    if embedding is not None and not (head is not None and head.tied_to):
        lookup = embedding.parameters * config.width
    widest = max(mixed, key=lambda block: block.routed)
    return Reads(
        shared=everything - round(sum(of_experts.values())) - lookup,
        experts=round(
            sum(
                size * block.reached(tokens) / block.expert_count
                for block, size in of_experts.items()
            )
        ),
        reached=widest.reached(tokens),
        experts_a_block=widest.expert_count,
        ways=3 if recompute_of(config, sizes, trained) == "full" else 2,
    )


def _expert_bytes(config: PlanConfig, sizes: Sizes, block: Block) -> float:
    """Return the bytes of all experts of a block."""
    quantized, rest = weight_terms(config, sizes, block.experts_with_biases)
    return float(sum(term.value for term in quantized + rest))
