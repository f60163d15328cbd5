"""Passes whose tokens are dealt over devices: the keys and values that each has of the others'
tokens, and what it sends of its own (processes/context.py)."""

from __future__ import annotations

from collections import Counter

from veneer.plan.activations import FLOAT32, recompute_of, tokens_of
from veneer.plan.amounts import Amount, Term, amount
from veneer.plan.plan import Plan
from veneer.plan.workspace import QUERY_BLOCK, SCORES_AT_ONCE

# Of all keys and values, in the dtype of computing: as they are gathered, by rows, and what is sent
# of their gradients; in float32: these by rows, and their sum.
NARROW, WIDE = 3, 2
# Numbers that are gathered at a time, or those of one key head (kernels/dealt_packing.py).
NUMBERS_AT_ONCE = 2**23


def rows_of_others(plan: Plan, pieces: int) -> Amount:
    """Return what a device has, beside its own tokens', of the keys and values of all, in one
    block: with their gradients, and the scores of a block of queries."""
    config, sizes = plan.config, plan.sizes
    tokens, of_one_head = tokens_of(config), 2 * sizes.head_dim
    least = max(of_one_head, NUMBERS_AT_ONCE // tokens // of_one_head * of_one_head)
    size = min(2 * sizes.kv, least)
    shared = sizes.q // max(1, sizes.kv)
    far = config.length - config.length // pieces
    scores = shared * min(QUERY_BLOCK, config.length) * far
    few = shared * QUERY_BLOCK * config.length <= SCORES_AT_ONCE
    return amount(
        "keys and values of others",
        *(
            Term.of(tokens, "tokens", size, "numbers", each * width, "bytes", note=note)
            for each, width, note in (
                (NARROW, config.width, "of one block"),
                (WIDE, FLOAT32, "their gradients"),
            )
        ),
        Term.of(
            *(3 if config.width < FLOAT32 else 2, "", 0 if few else scores, "scores"),
            *(config.width, "bytes"),
        ),
    )


def keys_and_values(plan: Plan, pieces: int) -> dict[str, list[Term]]:
    """Return what a device gives of them in a pass: its own forward, and again whenever they are
    needed once more; and the gradients of all."""
    config, sizes = plan.config, plan.sizes
    tokens, first = tokens_of(config), plan.trained.first_block
    again = 2 if recompute_of(config, sizes, plan.trained) == "full" else 1
    forward = Counter(block.kv for block in sizes.blocks if block.kv)
    backward = Counter(block.kv for block in sizes.blocks[first:] if block.kv)

    def term(count: int, kv: int, share: int, note: str) -> Term:
        return Term.of(
            *(count, "blocks", tokens // share, "tokens", 2 * kv, "numbers"),
            *(config.width, "bytes"),
            note=note,
        )

    return {
        "keys and values": [
            *(term(count, kv, pieces, "forward") for kv, count in forward.items()),
            *(term(again * count, kv, pieces, "backward") for kv, count in backward.items()),
        ],
        "gradients of keys and values": [
            term(count, kv, 1, "of all tokens") for kv, count in backward.items()
        ],
    }
