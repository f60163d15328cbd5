"""The most memory that is taken on a GPU for a moment only.

There kernels are torch's own operations (kernels/choice.py), of which several make copies in
float32 that the processor's functions of one pass do not. Where Triton's are installed they take
less than is planned here.
"""

from __future__ import annotations

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
from veneer.plan.workspace import CHUNK_LOGITS

# Tensors in the dtype of computing that the backward pass of a layer has at once beside what the
# layers keep, as counted on fake tensors (tests/gpu/test_memory.py): of the inner width where it
# goes through a gated activation, by autograd and in the two functions, ...
BY_AUTOGRAD, OF_ACTIVATION = 2, 6
# ... and where it goes through the two functions' norm, of the inner width and of the model's. Of
# these eight are four in float32; the last norm's, which are kept, are gone by then.
INNER_AT_NORM, DIM_AT_NORM = 4, 9


def card_workspace(config: PlanConfig, sizes: Sizes, trained: Trained) -> Amount:
    """Return the larger of the head's needs and those of a layer's backward pass."""
    stages = [_head(config, sizes, trained)]
    stages += [_block(config, sizes, trained, block) for block in sizes.kinds_of_block]
    return max(stages, key=lambda stage: stage.value)


def _head(config: PlanConfig, sizes: Sizes, trained: Trained) -> Amount:
    """What one chunk of rows takes (kernels/cross_entropy.py): logits, which become their gradient,
    and both in float32. A head that trains has its gradient beside them, and then, when what is in
    float32 is gone, the chunk's share of it."""
    width, trains = config.width, trained.trains_head
    tokens, rows = tokens_of(config), min(tokens_of(config), max(1, CHUNK_LOGITS // sizes.vocab))
    weight = (sizes.vocab, "vocab", sizes.dim, "numbers", width, "bytes")
    labelled = Term.of(
        *(2, "", tokens, "tokens", sizes.dim, "numbers", width, "bytes"),
        note="labelled rows, and their gradient",
    )
    loss = amount(
        "workspace",
        Term.of(
            *(rows, "rows", sizes.vocab, "vocab", (1 + trains) * width + 2 * FLOAT32, "bytes"),
            note="logits of one chunk, their logarithms and gradient",
        ),
        labelled,
        Term.of(int(trains), "", *weight, note="gradient of the head"),
    )
    if not trains:
        return loss
    gradient = amount(
        "workspace",
        Term.of(rows, "rows", sizes.vocab, "vocab", 2 * width, "bytes", note="logits of one chunk"),
        labelled,
        Term.of(2, "", *weight, note="gradient of the head, and the chunk's share of it"),
    )
    return max(loss, gradient, key=lambda stage: stage.value)


def _block(config: PlanConfig, sizes: Sizes, trained: Trained, block: Block) -> Amount:
    """What a layer's backward pass has at once, most of it where it goes through the activation or
    through a norm in Python, and what it computes again. Of a weight that is head and embedding,
    autograd keeps the head's gradient until it has both."""
    tokens, width = tokens_of(config), config.width
    again = recompute_of(config, sizes, trained)
    routed = is_one_function(block, trained)
    inner = block.dense if routed else block.inner
    fused = is_fused(block, trained)
    times = OF_ACTIVATION if fused else BY_AUTOGRAD
    numbers = ("numbers", width, "bytes")
    terms = [
        Term.of(tokens, "tokens", times, "", inner, *numbers, note="activation on the way back")
    ]
    if routed:
        terms.append(workspace_of_experts(config, block, tokens))
    if fused and sizes.norms_in_python:
        of_norm = INNER_AT_NORM * inner + DIM_AT_NORM * sizes.dim
        norm = Term.of(tokens, "tokens", of_norm, *numbers, note="norm on the way back")
        terms = max(terms, [norm], key=lambda stage: sum(term.value for term in stage))
    if any(layer.is_head and layer.tied_to for layer in trained.weights):
        note = "gradient of the head, until the embedding's is there too"
        terms.append(Term.of(sizes.vocab, "vocab", sizes.dim, *numbers, note=note))
    if again == "full":
        terms += kept_by_blocks(config, sizes, trained, [block])
    elif again == "selective":
        terms.append(
            Term.of(tokens, "tokens", 2 * inner, "numbers", width, "bytes", note="gate, up, again")
        )
    return amount("workspace", *terms)
