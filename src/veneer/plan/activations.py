"""The bytes that a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from veneer.adapter.report import TargetLine
from veneer.models.description import Layer
from veneer.plan.amounts import Term
from veneer.plan.config import PlanConfig
from veneer.plan.methods import Trained
from veneer.plan.routed import is_one_function, kept_by_experts
from veneer.plan.sizes import OWN_SCORES, Block, Sizes

# Packed batches are filled up to a multiple of this (TOKENS_STEP in fused/forward.py).
TOKENS_STEP = 64
FLOAT32 = 4
# Blocks of which what is kept is in memory even if it is on the disk: the one that is computed, and
# the one before it, which is read ahead (kernels/disk_arena.py).
BLOCKS_AT_WORK = 2
# Autograd's tensors are in the common heap, among others that are freed at once, whose holes
# nothing fits into: from the third step on, resident memory grows with the number of layers by this
# share more than the tensors take (full training of LLaMA's layers 0.54, adapters over GPT-2's
# 0.38; 8 × 256 tokens, 4 against 8 layers). The two functions keep theirs in an arena, without
# holes.
HOLES = 0.45
# Tensors of the inner width that activations in Python keep; torch's own keep one.
KEPT = {"gelu_new": 4, "gelu_fast": 4}
GATED = 3  # the activation's input, and both sides of its product with the other half
CLAMPED = 5  # a gate of gpt-oss's kind: its clamped input and the sigmoid's output too
SCANNED = 4  # tensors of a state's size that Mamba's scan in Python keeps, as measured
STATISTICS = 2  # that a norm's backward pass takes: mean and 1 / σ


def tokens_of(config: PlanConfig) -> int:
    """Return the tokens of one pass with padding; a longer row is a pass of its own."""
    tokens = max(config.tokens_per_batch, config.length)
    return -(-tokens // TOKENS_STEP) * TOKENS_STEP


def is_fused(block: Block, trained: Trained) -> bool:
    """Return whether a block is computed as the two functions of fused/block.py, or its attention
    as one of them beside a mixture of experts."""
    return block.structure is not None and not (trained.weights or trained.prefix)


def by_autograd(block: Block, trained: Trained) -> Block | None:
    """Return what of a block is left to autograd: all of it, its mixture, or nothing."""
    structure = block.structure
    if structure is None or not is_fused(block, trained):
        return block
    if structure.mixture is None:
        return None
    fused = {*structure.linears, *structure.norms, structure.attention.sinks}
    rest = tuple(layer for layer in block.layers if layer.inner_path not in fused)
    return replace(block, layers=rest, structure=None)


def all_fused(sizes: Sizes, trained: Trained) -> bool:
    """Return whether all blocks are computed as two functions."""
    return len(sizes.blocks) > 0 and all(is_fused(block, trained) for block in sizes.blocks)


def recompute_of(config: PlanConfig, sizes: Sizes, trained: Trained) -> str:
    """Return what is computed again: for `selective` and `disk` whole layers if the two functions
    do not suit all of them, for `disk` beside a mixture too, as fused/forward.py chooses."""
    suits = all_fused(sizes, trained)
    if config.recompute == "disk":
        suits &= all(by_autograd(block, trained) is None for block in sizes.blocks)
    if config.recompute in ("selective", "disk") and not suits:
        return "full"
    return config.recompute


def kept(config: PlanConfig, sizes: Sizes, trained: Trained) -> list[Term]:
    """Return what the layers, the last norm and the head keep."""
    tokens, width = tokens_of(config), config.width
    blocks = sizes.blocks[trained.first_block :]
    again = recompute_of(config, sizes, trained)
    if again == "disk":
        terms = kept_by_blocks(config, sizes, trained, blocks[-BLOCKS_AT_WORK:])
        terms += [_log_sums(config, block) for block in blocks[:-BLOCKS_AT_WORK]]
    elif again == "full":
        terms = [
            Term.of(
                *(len(blocks), "layers", tokens, "tokens", sizes.dim, "numbers", width, "bytes"),
                note="the input of each layer",
            )
        ]
    else:
        terms = kept_by_blocks(config, sizes, trained, blocks)
    wide = FLOAT32 if sizes.norms_in_python else width
    last = width if sizes.norms_in_python and trained.trains_head else 0
    terms += [
        Term.of(tokens, "tokens", sizes.dim, "numbers", wide + last, "bytes", note="last norm"),
        Term.of(
            *(2 if trained.trains_head else 1, "", tokens, "tokens", sizes.dim, "numbers"),
            *(width, "bytes"),
            note="what the head reads, or its gradient",
        ),
    ]
    if sizes.is_rotary:
        terms.append(
            Term.of(
                *(2, "", tokens, "tokens", sizes.head_dim, "numbers", width, "bytes"),
                note="cosines and sines",
            )
        )
    return terms


def kept_on_disk(config: PlanConfig, sizes: Sizes, trained: Trained) -> list[Term]:
    """Return what `disk` writes to it."""
    if recompute_of(config, sizes, trained) != "disk":
        return []
    return kept_by_blocks(config, sizes, trained, sizes.blocks[trained.first_block :])


def holes(config: PlanConfig, sizes: Sizes, trained: Trained) -> Term:
    """Return the holes in the heap between the tensors of blocks that autograd computes."""
    total = 0
    if recompute_of(config, sizes, trained) != "full":
        for block, count in trained.counted(sizes.blocks[trained.first_block :]):
            if (rest := by_autograd(block, trained)) is not None:
                terms = _by_autograd(config, sizes, trained, rest)
                total += count * sum(term.value for term in terms)
    return Term.of(HOLES, "of", total, "bytes", note="holes in the heap between all these")


def kept_by_blocks(
    config: PlanConfig, sizes: Sizes, trained: Trained, blocks: Iterable[Block]
) -> list[Term]:
    """Return what blocks keep that are not computed again whole; equal blocks share a term."""
    alike: Counter[Term] = Counter()
    for block, count in trained.counted(blocks):
        for term in _kept_by_block(config, sizes, trained, block):
            alike[term] += count
    return [term.times(count, "layers") for term, count in alike.items() if term.value]


def _kept_by_block(config: PlanConfig, sizes: Sizes, trained: Trained, block: Block) -> list[Term]:
    terms = []
    if is_fused(block, trained):
        terms += _by_two_functions(config, sizes, trained, block)
    if (rest := by_autograd(block, trained)) is None:
        return terms
    terms += _by_autograd(config, sizes, trained, rest)
    if is_one_function(rest, trained):
        terms += kept_by_experts(
            config,
            trained,
            rest,
            tokens_of(config),
            reads_kept=(False, sizes.dim) in _inputs(rest, trained),
            selective=recompute_of(config, sizes, trained) == "selective",
        )
    return terms


def _by_two_functions(
    config: PlanConfig, sizes: Sizes, trained: Trained, block: Block
) -> list[Term]:
    """x of both halves, attention's output, q, k, v, gate and up, A x, and attention's sums.

    `selective` makes q, k, v, gate, up and their A x again (save_for_backward in fused/block.py).
    What the halves' last layers gave is kept for a norm over it or for their magnitudes; then the
    second half's x need not be, unless the halves are parallel and share theirs, or it is a
    mixture, whose norm keeps it.
    """
    structure = block.structure
    assert structure is not None
    tokens, width = tokens_of(config), config.width
    selective = recompute_of(config, sizes, trained) == "selective"
    of_halves = set(structure.linears)
    lines = [line for line in _lines(block, trained) if line.layer.inner_path in of_halves]
    gained = {line.layer.inner_path for line in lines} if config.method == "dora" else set()
    halves = structure.halves
    outs = {layer.inner_path: layer.out for layer in block.layers}
    qkv, inner = (*(sum(outs[path] for path in half.projections) for half in halves), 0)[:2]
    kept_outputs = [half.post_norm is not None or half.output in gained for half in halves]
    shares = structure.parallel or (kept_outputs[0] and structure.mixture is None)
    inputs = 1 if shares else 2
    widths = [
        (inputs * sizes.dim, "input of both halves"),
        (sum(kept_outputs) * sizes.dim, "what the halves' last layers gave"),
        (block.q, "what attention gave"),
    ]
    if not selective:
        widths += [(qkv, "q, k, v"), (inner, "gate and up" if block.is_gated else "up")]
    again = {path for half in halves for path in half.projections} if selective else set()
    post_norms = sum(half.post_norm is not None for half in halves)
    return [
        *(
            Term.of(tokens, "tokens", size, "numbers", width, "bytes", note=note)
            for size, note in widths
        ),
        _ranks(config, [line for line in lines if line.layer.inner_path not in again]),
        _log_sums(config, block),
        Term.of(
            *(tokens, "tokens", post_norms * STATISTICS, "numbers", FLOAT32, "bytes"),
            note="statistics of the halves' last norms",
        ),
    ]


def _by_autograd(config: PlanConfig, sizes: Sizes, trained: Trained, block: Block) -> list[Term]:
    """What torch keeps of transformers' own layers.

    Norms: their input, in float32 for those in Python, and what a trained weight multiplies. Linear
    layers that train or are adapted: their input. Attention: q, k, v and its output, and the scores
    of the model's own attention. Activation: see KEPT. Experts: the output of each that computes a
    token, for the router, and the inputs of those that train. Adapted parameters: W + s B A.
    """
    tokens, width = tokens_of(config), config.width
    lines = _lines(block, trained)
    experts, inner, routed = block.experts, block.inner, block.routed
    if is_one_function(block, trained):
        experts, inner, routed = 0, block.dense, 0
        lines = [line for line in lines if not line.layer.is_stack]
    norms = sum(_norm_bytes(norm, block, config, sizes, trained) for norm in block.norms)
    inputs = _inputs(block, trained)
    # DoRA's magnitude multiplies each adapted layer's output, which is kept for its gradient.
    gained = sum(line.out for line in lines) if config.method == "dora" else 0
    gated = CLAMPED if getattr(sizes.config, "swiglu_limit", None) else GATED
    times = gated if block.is_gated else KEPT.get(sizes.activation, 1)
    # Rotated q and k are kept besides the one tensor that has v.
    one_product = any(layer.out > block.q for layer in block.attention)
    turned = block.q + block.kv if sizes.is_rotary and one_product else 0
    attention = 2 * block.q + 2 * block.kv + turned
    stacks = any(x.is_stack and x.path in trained.own_paths for x in block.layers)
    per_expert = sizes.dim * (1 + stacks)
    sums = sum(line.out * line.in_ for line in lines if line.layer.parameter)
    trains_sinks = any(x.name == "sinks" and x.path in trained.own_paths for x in block.layers)
    numbers = ("numbers", width, "bytes")
    return [
        Term.of(tokens, "tokens", norms, "bytes", note="norms"),
        Term.of(tokens, "tokens", sum(inputs.values()), *numbers, note="inputs of linear layers"),
        Term.of(tokens, "tokens", gained, *numbers, note="what magnitudes multiply"),
        Term.of(tokens, "tokens", attention, *numbers, note="q, k, v and what attention gave"),
        Term.of(tokens, "tokens", times, "", inner, *numbers, note="activation"),
        Term.of(tokens, "tokens", experts, "experts", per_expert, *numbers, note="x and y"),
        Term.of(tokens, "tokens", stacks * routed, *numbers, note="inputs of experts"),
        _log_sums(config, block),
        Term.of(
            *(tokens, "tokens", block.attention_heads, "heads", config.length, "keys"),
            *(OWN_SCORES if trains_sinks else sizes.score_bytes, "bytes"),
            note="scores of the model's own attention",
        ),
        Term.of(
            *(tokens, "tokens", SCANNED, "", block.state, "numbers", FLOAT32, "bytes"),
            note="states of Mamba's scan",
        ),
        _ranks(config, lines),
        Term.of(sums, *numbers, note="W + s B A of adapted parameters"),
    ]


def _inputs(block: Block, trained: Trained) -> dict[tuple[bool, int], int]:
    """Return the widths of what linear layers that train or are adapted read; those that share an
    input have one key."""
    inputs = {}
    for layer in block.layers:
        # The layer that leads out of attention reads what attention keeps anyway.
        touched = layer.path in trained.own_paths or layer.path in trained.lines
        if touched and layer.is_linear and layer is not block.output:
            half = layer.in_attention or block.has_one_norm
            inputs[half, layer.in_] = layer.in_
    return inputs


def _lines(block: Block, trained: Trained) -> list[TargetLine]:
    return [trained.lines[x.path] for x in block.layers if x.path in trained.lines]


def _norm_bytes(
    norm: Layer, block: Block, config: PlanConfig, sizes: Sizes, trained: Trained
) -> int:
    if not sizes.norms_in_python:
        return block.norm_width(norm) * config.width
    trains = norm.path in trained.own_paths
    return block.norm_width(norm) * (FLOAT32 + config.width * trains)


def _ranks(config: PlanConfig, lines: Iterable[TargetLine]) -> Term:
    ranks = sum(line.rank * (1 + line.has_start) for line in lines)
    tokens = tokens_of(config)
    return Term.of(ranks, "ranks", tokens, "tokens", config.width, "bytes", note="A x")


def _log_sums(config: PlanConfig, block: Block) -> Term:
    tokens, heads = tokens_of(config), block.attention_heads
    return Term.of(tokens, "tokens", heads, "heads", FLOAT32, "bytes", note="attention's log Σ exp")
