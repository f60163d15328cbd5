"""The most memory that is taken for a moment only, by the head or by one layer's backward pass."""

from __future__ import annotations

import math

from veneer.plan.activations import (
    FLOAT32,
    is_fused,
    kept_by_blocks,
    recompute_of,
    tokens_of,
)
from veneer.plan.amounts import Amount, Term, amount
from veneer.plan.config import PlanConfig
from veneer.plan.methods import Trained
from veneer.plan.routed import is_one_function, workspace_of_experts
from veneer.plan.sizes import Block, Sizes

CHUNK_LOGITS = 2**24  # logits held at a time (kernels/cross_entropy.py)
BLOCK_TOKENS = 2**14  # rows of the head in one product (kernels/cross_entropy.py)
BLOCK_NUMBERS = 2**23  # of a quantized weight, made dense at a time (quant/weight.py)
QUERY_BLOCK = 256  # queries whose scores are held at a time (kernels/score_blocks.py)
SCORES_AT_ONCE = (
    2**21
)  # scores held at a time, if more than one key head's (kernels/score_blocks.py)


def workspace(config: PlanConfig, sizes: Sizes, trained: Trained) -> Amount:
    """Return the larger of the head's needs and those of a layer's backward pass."""
    stages = [_head(config, sizes, trained)]
    stages += [_block(config, sizes, trained, block) for block in sizes.kinds_of_block]
    return max(stages, key=lambda stage: stage.value)


def _head(config: PlanConfig, sizes: Sizes, trained: Trained) -> Amount:
    """Logits of one chunk of rows, and a copy of the head's weight for the matrix units."""
    width = config.width
    rows = min(tokens_of(config), max(1, CHUNK_LOGITS // sizes.vocab))
    weight = Term.of(
        *(2, "", sizes.vocab, "vocab", sizes.dim, "numbers", width, "bytes"),
        note="gradient of the head, and the chunk's share of it",
    )
    return amount(
        "workspace",
        Term.of(
            *(2 if trained.trains_head else 1, "", rows, "rows", sizes.vocab, "vocab"),
            *(width, "bytes"),
            note="logits of one chunk",
        ),
        Term.of(
            *(min(sizes.vocab, BLOCK_TOKENS), "vocab", sizes.dim, "numbers", width, "bytes"),
            note="the head's weight, copied for the product",
        ),
        Term.of(rows, "rows", sizes.dim, "numbers", FLOAT32, "bytes", note="their gradient"),
        *([weight] if trained.trains_head else []),
    )


def _block(config: PlanConfig, sizes: Sizes, trained: Trained, block: Block) -> Amount:
    """Gradients of one layer's inner values, the scores of one block of queries, a dequantized
    weight, and what the layer computes again."""
    tokens, width = tokens_of(config), config.width
    again = recompute_of(config, sizes, trained)
    routed = is_one_function(block, trained)
    inner = block.dense if routed else block.inner
    feed_forward = [
        Term.of(
            *(tokens, "tokens", 4 * inner + 4 * sizes.dim, "numbers", width, "bytes"),
            note="feed-forward layer on the way back",
        )
    ]
    if routed:
        feed_forward.append(workspace_of_experts(config, block, tokens))
    scores = _scores(config, block)
    rows = Term.of(
        *(tokens, "tokens", 6 * block.q + 6 * block.kv, "numbers", width, "bytes"),
        note="q, k, v and their gradients, by heads",
    )
    attention = [scores, rows]
    larger = max(attention, feed_forward, key=lambda terms: sum(term.value for term in terms))
    if again == "full":
        larger += kept_by_blocks(config, sizes, trained, [block])
    elif again == "selective":
        numbers = block.q + 2 * block.kv if larger is attention else 2 * inner
        larger.append(
            Term.of(
                *(tokens, "tokens", numbers, "numbers", width, "bytes"), note="projections, again"
            )
        )
    if config.base_bits < 16:
        # Experts are made dense one by one.
        layers = sizes.description.quantizable
        largest = max((math.prod(layer.oriented[-2:]) for layer in layers), default=0)
        most = min(BLOCK_NUMBERS, largest)
        larger.append(Term.of(most, "numbers", width, "bytes", note="rows made dense at a time"))
    if trained.trains_head:
        larger.append(
            Term.of(
                *(2, "", sizes.vocab, "vocab", sizes.dim, "numbers", width, "bytes"),
                note="gradient of the head, before and after it is scaled",
            )
        )
    if not is_fused(block, trained) and sizes.norms_in_python:
        larger.append(
            Term.of(
                *(3, "", tokens, "tokens", sizes.dim, "numbers", FLOAT32, "bytes"),
                note="a norm's gradients in float32",
            )
        )
    return amount("workspace", *larger)


def _scores(config: PlanConfig, block: Block) -> Term:
    """Attention's scores, what rounding to 16 bits left of them, and their gradient.

    They are those of one block of queries, and of as many heads as SCORES_AT_ONCE has room for, but
    of one key head's at least.
    """
    tokens, heads = tokens_of(config), block.attention_heads
    queries = min(QUERY_BLOCK, config.length)
    shared = block.q // max(1, block.kv)  # heads that share a key head
    most = max(SCORES_AT_ONCE, shared * queries * config.length)
    tensors = 3 if config.width == 2 else 2
    note = "attention's scores and their gradient"
    if tokens * heads * queries > most:
        return Term.of(tensors, "", most, "scores", config.width, "bytes", note=note)
    return Term.of(
        *(tensors, "", tokens, "tokens", heads, "heads", queries, "queries"),
        *(config.width, "bytes"),
        note=note,
    )
