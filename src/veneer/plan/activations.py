"""What a forward pass keeps for the backward pass, in bytes."""

from __future__ import annotations

from veneer.plan.amounts import Term
from veneer.plan.config import PlanConfig
from veneer.plan.methods import Trained
from veneer.plan.shapes import ModelShape, Part

# Packed batches are filled up to a multiple of this (TOKENS_STEP in fused/forward.py).
TOKENS_STEP = 64
FLOAT32 = 4
# Layers that lead out of attention: their input is its output, not the residual stream.
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
# What autograd keeps lies in the common heap, between what is let go at once, and leaves holes that
# nothing fits into: from the third step on, resident memory grows with the number of layers by this
# much more than what they keep (full training of LLaMA's layers 0.54, adapters over GPT-2's 0.38;
# 8 × 256 tokens, 4 against 8 layers). The two functions keep theirs in an arena, without holes.
HOLES = 0.45
# How many tensors of the inner width an activation keeps that is written out in Python; torch's own
# keep one.
KEPT = {"gelu_new": 4, "gelu_fast": 4}


def tokens_of(config: PlanConfig) -> int:
    """Return the tokens of one pass, filled up; a longer row is a pass of its own."""
    tokens = max(config.tokens_per_batch, config.length)
    return -(-tokens // TOKENS_STEP) * TOKENS_STEP


def is_fused(shape: ModelShape, trained: Trained) -> bool:
    """Say whether the blocks are computed as the two functions of fused/block.py."""
    dropout = any(each.dropout for each in trained.adapted)
    return shape.fused and not (trained.weights or dropout or trained.prefix)


def recompute_of(config: PlanConfig, shape: ModelShape, trained: Trained) -> str:
    """Return what is computed again: whole layers for `selective` where the two functions do not
    suit, as fused/forward.py chooses."""
    if config.recompute == "selective" and not is_fused(shape, trained):
        return "full"
    return config.recompute


def kept(config: PlanConfig, shape: ModelShape, trained: Trained) -> list[Term]:
    """Return what all layers, the last norm and the head keep."""
    tokens, width = tokens_of(config), config.width
    layers = shape.depth - trained.first_block
    if recompute_of(config, shape, trained) == "full":
        terms = [
            Term.of(
                *(layers, "layers", tokens, "tokens", shape.dim, "numbers", width, "bytes"),
                note="the input of each layer",
            )
        ]
    else:
        terms = kept_by_layers(config, shape, trained, layers)
    wide = FLOAT32 if shape.norms_in_python else width
    last = width if shape.norms_in_python and _is_full(trained) else 0
    terms += [
        Term.of(tokens, "tokens", shape.dim, "numbers", wide + last, "bytes", note="last norm"),
        Term.of(
            *(2 if _is_full(trained) else 1, "", tokens, "tokens", shape.dim, "numbers"),
            *(width, "bytes"),
            note="what the head reads, or its gradient",
        ),
    ]
    if shape.rotary:
        terms.append(
            Term.of(
                *(2, "", tokens, "tokens", shape.head_dim, "numbers", width, "bytes"),
                note="cosines and sines",
            )
        )
    if not shape.plain_head:
        terms.append(
            Term.of(
                *(tokens, "tokens", shape.words, "words", FLOAT32, "bytes"),
                note="log p of all words, as this head scales its logits",
            )
        )
    return terms


def holes(config: PlanConfig, shape: ModelShape, trained: Trained) -> Term:
    """Return what the heap cannot use between what autograd keeps."""
    terms = kept(config, shape, trained)
    through = not is_fused(shape, trained) and recompute_of(config, shape, trained) != "full"
    total = sum(term.value for term in terms) if through else 0
    return Term.of(HOLES, "of", total, "bytes", note="holes in the heap between all these")


def kept_by_layers(
    config: PlanConfig, shape: ModelShape, trained: Trained, layers: int
) -> list[Term]:
    """Return what so many layers keep that are not computed again whole."""
    if is_fused(shape, trained):
        return _by_two_functions(config, shape, trained, layers)
    return _by_autograd(config, shape, trained, layers)


def _by_two_functions(
    config: PlanConfig, shape: ModelShape, trained: Trained, layers: int
) -> list[Term]:
    """x of both halves, attention's output, q, k, v, gate and up, A x, and attention's sums.

    `selective` makes q, k, v, gate, up and their A x again (save_for_backward in fused/block.py).
    """
    tokens, width = tokens_of(config), config.width
    sparing = recompute_of(config, shape, trained) == "selective"
    sizes = [(2 * shape.dim, "input of both halves"), (shape.q, "what attention gave")]
    if not sparing:
        sizes += [(shape.q + 2 * shape.kv, "q, k, v"), (2 * shape.inner, "gate and up")]
    if config.method == "dora" and any(x.part.name == "down_proj" for x in trained.adapted):
        sizes.append((shape.dim, "what down_proj gave, for its magnitude"))
    terms = [
        Term.of(
            *(layers, "layers", tokens, "tokens", size, "numbers", width, "bytes"),
            note=note,
        )
        for size, note in sizes
    ]
    share = layers / max(1, shape.depth - trained.first_block)
    again = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") if sparing else ()
    ranks = sum(x.acting_rank for x in trained.adapted if x.part.name not in again) * share
    terms += [
        Term.of(ranks, "ranks", tokens, "tokens", width, "bytes", note="A x"),
        _log_sums(shape, layers, tokens),
    ]
    return terms


def _by_autograd(
    config: PlanConfig, shape: ModelShape, trained: Trained, layers: int
) -> list[Term]:
    """What torch keeps of transformers' own layers.

    Norms: their input, in float32 where they are written in Python, and what is multiplied by a
    weight that trains. Linear layers: their input, where they train or an adapter lies on them.
    Attention: q, k, v and its output, and scores where it is the model's own. Activation: see KEPT.
    """
    tokens, width = tokens_of(config), config.width
    parts = shape.in_block(shape.depth - 1)
    own = {part.path for part in trained.weights}
    touched = own | {each.part.path for each in trained.adapted}
    norms = [part for part in parts if part.kind == "norm"]
    norm_bytes = 0
    for part in norms:
        wide = _norm_width(part, shape)
        norm_bytes += wide * (FLOAT32 if shape.norms_in_python else width)
        norm_bytes += wide * width if shape.norms_in_python and part.path in own else 0
    # Halves that run side by side share the one norm, and so their input.
    shared = sum(part.out == shape.dim and not part.in_attention for part in norms) == 1
    inputs = {}
    for part in parts:
        # What leads out of attention reads what attention keeps anyway.
        if part.path in touched and not (part.in_attention and part.name in OUTPUTS):
            inputs[part.in_attention or shared, part.in_] = part.in_
    # DoRA's gain multiplies what each adapted layer gives, which is kept for the magnitude.
    dora = config.method == "dora"
    gained = sum(x.part.out for x in trained.adapted if dora and x.part in parts)
    masks = sum(x.part.in_ for x in trained.adapted if x.dropout and x.part in parts)
    if any(part.name in ("gate_proj", "gate_up_proj") for part in parts):
        times = 3  # the activation's input, and both sides of its product with the other half
    else:
        times = KEPT.get(shape.activation, 1)
    # Turned q and k stand beside the one tensor of which v is a part.
    one_product = any(part.in_attention and part.out > shape.q for part in parts)
    turned = shape.q + shape.kv if shape.rotary and one_product else 0
    per_layer = (layers, "layers", tokens, "tokens")
    share = layers / max(1, shape.depth - trained.first_block)
    return [
        Term.of(*per_layer, norm_bytes, "bytes", note="norms"),
        Term.of(
            *(*per_layer, sum(inputs.values()), "numbers", width, "bytes"),
            note="inputs of linear layers",
        ),
        Term.of(*per_layer, masks, "numbers", width, "bytes", note="masks of dropout"),
        Term.of(*per_layer, gained, "numbers", width, "bytes", note="what magnitudes multiply"),
        Term.of(
            *(*per_layer, 2 * shape.q + 2 * shape.kv + turned, "numbers", width, "bytes"),
            note="q, k, v and what attention gave",
        ),
        Term.of(
            *(*per_layer, times, "", shape.inner, "numbers", width, "bytes"),
            note="activation",
        ),
        _log_sums(shape, layers, tokens),
        Term.of(
            *(*per_layer, shape.heads, "heads", config.length, "keys", shape.score_bytes, "bytes"),
            note="scores of the model's own attention",
        ),
        Term.of(trained.ranks * share, "ranks", tokens, "tokens", width, "bytes", note="A x"),
    ]


def _is_full(trained: Trained) -> bool:
    return any(part.is_head for part in trained.weights)


def _norm_width(part: Part, shape: ModelShape) -> int:
    """Return the numbers a token that a norm reads: those of all heads where it has one head's."""
    if part.in_attention and part.out == shape.head_dim:
        return shape.q if part.name.startswith("q") else shape.kv
    return part.out


def _log_sums(shape: ModelShape, layers: int, tokens: int) -> Term:
    return Term.of(
        *(layers, "layers", tokens, "tokens", shape.heads, "heads", FLOAT32, "bytes"),
        note="attention's log Σ exp",
    )
