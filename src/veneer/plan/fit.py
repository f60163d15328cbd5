"""Whether a plan fits a machine's memory, and the gentlest settings that make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from veneer.fused.recompute import Recompute
from veneer.plan.activations import recompute_of
from veneer.plan.config import PlanConfig
from veneer.plan.plan import Plan, replanned
from veneer.quant.settings import Bits

# How much longer a step takes, as docs/performance.md measures it: 1,521 against 1,389 tokens/s for
# selective; a second forward pass beside one forward and one backward pass for full. Of the disk
# only a bound is known, for disks differ: whoever asks for it expects no more than full costs.
SLOWER: dict[Recompute, float] = {"none": 1.0, "selective": 1.09, "disk": 1.33, "full": 1.33}
# The fixed cost of a pass, in tokens: 0.30 s at 256, 1.15 s at 2,048 tokens (the same page).
PASS_TOKENS = 400
# Of the free memory, what a plan that is not to "just fit" leaves: it may be wrong by as much.
MARGIN = 0.1
LEAST_TOKENS = 64  # a shorter pass is mostly overhead
# The most that is kept first; `disk`, which needs room there, is left only by those who chose it.
LEVELS: tuple[Recompute, ...] = ("none", "selective", "disk", "full")


def gentlest(plan: Plan, free: int) -> Plan | None:
    """Return the cheapest plan that fits `free` bytes, or None."""
    changed = (replanned(plan, config) for config in alternatives(plan))
    return next((other for other in changed if other.memory.peak <= free), None)


def alternatives(plan: Plan) -> Iterator[PlanConfig]:
    """Yield the plan's settings and gentle changes to them, the cheapest first.

    First those that cost only time, ordered by how much longer a token takes: smaller passes, and
    computing again. They do not change what is learnt. Fewer bits do, so these come after: a base
    in 8 bits, in 4, and one that is mapped from the disk, or that a GPU's host keeps, which changes
    nothing either, but copies all of it in each pass.
    """
    config = plan.config
    levels: dict[str, Recompute] = {}  # by what a level comes to for this model
    for level in LEVELS[LEVELS.index(config.recompute) :]:
        if level != "disk" or config.recompute == "disk":
            comes_to = recompute_of(replace(config, recompute=level), plan.sizes, plan.trained)
            if level in (config.recompute, comes_to):
                levels.setdefault(comes_to, level)
    for base in _bases(config, on_card=plan.on_card):
        changed = [
            replace(base, tokens_per_batch=tokens, recompute=level)
            for tokens in _fewer(config)
            for level in levels.values()
        ]
        yield from sorted(changed, key=_seconds)


def flags(before: PlanConfig, after: PlanConfig) -> str:
    """Return the flags that turn the settings `before` into `after`."""
    changed = []
    for name, attribute in (
        ("recompute", "recompute"),
        ("tokens-per-batch", "tokens_per_batch"),
        ("max-length", "max_length"),
        ("bits", "base_bits"),  # which qlora implies
        ("offload", "offload"),
    ):
        value = getattr(after, attribute)
        if value != getattr(before, attribute):
            changed.append(f"--{name} {value}")
    return " ".join(changed + ["--mapped"] * (after.mapped and not before.mapped))


def _bases(config: PlanConfig, *, on_card: bool) -> Iterator[PlanConfig]:
    yield config
    if config.method in ("full", "freeze"):
        return
    smaller: tuple[Bits, ...] = () if config.mapped else (8, 4)
    for bits in smaller:
        if bits < config.base_bits:
            yield replace(config, bits=bits)
    if on_card and config.offload == "none":
        yield replace(config, offload="cpu")
    if on_card and not config.mapped:
        yield replace(config, bits=4, offload="cpu")
    elif not config.mapped:
        yield replace(config, bits=4, mapped=True)


def _fewer(config: PlanConfig) -> Iterator[int]:
    tokens, least = config.tokens_per_batch, max(LEAST_TOKENS, config.max_length or 0)
    yield tokens
    while tokens > least:
        tokens = max(least, tokens // 2)
        yield tokens


def _seconds(config: PlanConfig) -> float:
    """Return how many times the least time a token takes."""
    return SLOWER[config.recompute] * (1 + PASS_TOKENS / config.tokens_per_batch)
