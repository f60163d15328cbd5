"""The largest that is there for a moment only, beside all that lasts."""

from __future__ import annotations

from veneer.plan.activations import (
    FLOAT32,
    is_fused,
    kept_by_layers,
    recompute_of,
    tokens_of,
)
from veneer.plan.amounts import Amount, Term, amount
from veneer.plan.config import PlanConfig
from veneer.plan.methods import Trained
from veneer.plan.shapes import ModelShape

CHUNK_LOGITS = 2**24  # logits held at a time (kernels/cross_entropy.py)
BLOCK_WORDS = 2**14  # rows of the head that one product lays out anew (kernels/cross_entropy.py)
BLOCK_NUMBERS = 2**23  # of a packed weight, unpacked at a time (quant/weight.py)
QUERY_BLOCK = 256  # queries whose scores are held at a time (kernels/attention.py)


def workspace(config: PlanConfig, shape: ModelShape, trained: Trained) -> Amount:
    """Return the larger of what the head and what a layer's backward pass need at a time."""
    stages = [_head(config, shape, trained), _layer(config, shape, trained)]
    return max(stages, key=lambda stage: stage.value)


def _head(config: PlanConfig, shape: ModelShape, trained: Trained) -> Amount:
    """Logits of one chunk of rows, and the head's weight, laid out for the matrix units."""
    width = config.width
    if not shape.plain_head:
        return amount(
            "workspace",
            Term.of(
                *(tokens_of(config), "tokens", shape.words, "words", width + FLOAT32, "bytes"),
                note="logits of all rows, and their gradient in float32",
            ),
        )
    rows = min(tokens_of(config), max(1, CHUNK_LOGITS // shape.words))
    trains = any(part.is_head for part in trained.weights)
    weight = Term.of(
        *(2, "", shape.words, "words", shape.dim, "numbers", width, "bytes"),
        note="gradient of the head, and the chunk's part in it",
    )
    return amount(
        "workspace",
        Term.of(
            *(2 if trains else 1, "", rows, "rows", shape.words, "words", width, "bytes"),
            note="logits of one chunk",
        ),
        Term.of(
            *(min(shape.words, BLOCK_WORDS), "words", shape.dim, "numbers", width, "bytes"),
            note="the head's weight, laid out for the product",
        ),
        Term.of(rows, "rows", shape.dim, "numbers", FLOAT32, "bytes", note="their gradient"),
        *([weight] if trains else []),
    )


def _layer(config: PlanConfig, shape: ModelShape, trained: Trained) -> Amount:
    """Gradients of one layer's inner values, attention's scores of one block of queries, a packed
    weight unpacked, and what the layer computes again."""
    tokens, width = tokens_of(config), config.width
    again = recompute_of(config, shape, trained)
    feed_forward = Term.of(
        *(tokens, "tokens", 4 * shape.inner + 4 * shape.dim, "numbers", width, "bytes"),
        note="feed-forward layer on the way back",
    )
    scores = Term.of(
        *(2, "", tokens, "tokens", shape.heads, "heads"),
        *(min(QUERY_BLOCK, config.length), "queries", width, "bytes"),
        note="attention's scores and their gradient",
    )
    rows = Term.of(
        *(tokens, "tokens", 6 * shape.q + 6 * shape.kv, "numbers", width, "bytes"),
        note="q, k, v and their gradients, by heads",
    )
    attention = [scores, rows]
    larger = attention if scores.value + rows.value > feed_forward.value else [feed_forward]
    if again == "full":
        larger += kept_by_layers(config, shape, trained, 1)
    elif again == "selective":
        sizes = shape.q + 2 * shape.kv if larger is attention else 2 * shape.inner
        larger.append(
            Term.of(
                *(tokens, "tokens", sizes, "numbers", width, "bytes"), note="projections, again"
            )
        )
    if config.base_bits < 16:
        most = min(BLOCK_NUMBERS, max(part.out * part.in_ for part in shape.quantizable))
        larger.append(Term.of(most, "numbers", width, "bytes", note="rows unpacked at a time"))
    head = [part for part in trained.weights if part.is_head]
    if head:
        larger.append(
            Term.of(
                *(2, "", shape.words, "words", shape.dim, "numbers", width, "bytes"),
                note="gradient of the head, before and after it is scaled",
            )
        )
    if not is_fused(shape, trained) and shape.norms_in_python:
        larger.append(
            Term.of(
                *(3, "", tokens, "tokens", shape.dim, "numbers", FLOAT32, "bytes"),
                note="a norm's gradients in float32",
            )
        )
    return amount("workspace", *larger)
