"""The routed experts of a block that are computed as one function (lowrank/experts.py): what it
keeps for the backward pass, and what it takes for a moment."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.adapter.experts import has_experts
from veneer.adapter.report import TargetLine
from veneer.models.description import Layer
from veneer.plan.amounts import Term
from veneer.plan.config import PlanConfig
from veneer.plan.methods import Trained
from veneer.plan.sizes import Block

# The stack that reads the residual stream, by transformers' contract (integrations/moe.py).
FIRST_STACKS = ("gate_up_proj", "up_proj")
FLOAT32 = 4
# oneDNN keeps each product that it has prepared for a shape, up to this many; 300 of them in 16
# bits took 171 MB, whatever their widths. Each expert has another number of rows in each step.
PREPARED, PREPARED_BYTES = 1024, 570_000
WAYS = 4  # products of an expert: with both stacks, forward and backward


def is_one_function(block: Block, trained: Trained) -> bool:
    """Return whether a block's routed experts are likely computed so: they follow transformers'
    contract, and nothing but adapters trains of them. A run proves it by numbers."""
    stacks = _stacks(block)
    return (
        block.routed > 0
        and any(stack.name in FIRST_STACKS for stack in stacks)
        and all(has_experts(stack.module) for stack in stacks)
        and not any(stack.path in trained.own_paths for stack in stacks)
    )


def kept_by_experts(
    config: PlanConfig,
    trained: Trained,
    block: Block,
    tokens: int,
    *,
    reads_kept: bool,
    selective: bool,
) -> list[Term]:
    """Return what the function keeps: gate and up of each row (a token with one of its experts),
    A x of both stacks, x, and the router's probabilities.

    reads_kept: whether something else keeps the same x. selective: gate and up are made again.
    """
    width, rows = config.width, (tokens, "tokens", block.experts, "experts")
    first = next(stack for stack in _stacks(block) if stack.name in FIRST_STACKS)
    ranks = sum(line.rank * (1 + line.has_start) for line in _lines(block, trained))
    x = 0 if reads_kept else block.dim
    outputs = 0 if selective else first.oriented[1]
    return [
        Term.of(*rows, outputs, "numbers", width, "bytes", note="gate and up of experts"),
        Term.of(*rows, ranks, "ranks", width, "bytes", note="A x of experts"),
        Term.of(tokens, "tokens", x, "numbers", width, "bytes", note="x of experts"),
        Term.of(
            *(tokens, "tokens", block.expert_count, "experts", FLOAT32, "bytes"),
            note="the router's probabilities",
        ),
    ]


def workspace_of_experts(config: PlanConfig, block: Block, tokens: int) -> Term:
    """Return what the backward pass of the function has at once: of each row four vectors of the
    residual stream's width (dy, dx, and dx by tokens before and after the router's weights) and
    four of the inner width (the activation, its gradient, those of gate and up)."""
    return Term.of(
        *(tokens, "tokens", block.experts, "experts", 4 * (block.dim + block.expert_width)),
        *("numbers", config.width, "bytes"),
        note="experts on the way back",
    )


def prepared_products(config: PlanConfig, blocks: Sequence[Block], tokens: int) -> list[Term]:
    """Return what oneDNN keeps of products with experts, beside the few that other layers need."""
    if config.width == FLOAT32 or not any(block.routed for block in blocks):
        return []
    count = min(PREPARED, WAYS * tokens)
    note = "oneDNN's, for each number of rows of an expert"
    return [Term.of(count, "products", PREPARED_BYTES, "bytes", note=note)]


def _stacks(block: Block) -> list[Layer]:
    return [layer for layer in block.layers if layer.is_stack]


def _lines(block: Block, trained: Trained) -> list[TargetLine]:
    return [trained.lines[x.path] for x in _stacks(block) if x.path in trained.lines]
