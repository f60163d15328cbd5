"""A run over several alike devices: what each holds, what it sends in a step, and what fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from veneer.plan.activations import FLOAT32
from veneer.plan.amounts import Amount, Term, amount
from veneer.plan.config import PlanConfig
from veneer.plan.fit import SLOWER, alternatives
from veneer.plan.memory import weight_terms
from veneer.plan.plan import Plan, replanned
from veneer.plan.sizes import Block

# What of the base is sharded: nothing, or its blocks.
Sharded = Literal["none", "base"]
# Blocks that are whole at a time: the one that computes, and the one ahead of it.
GATHERED_BLOCKS = 2
LEAST_ROW = 64  # tokens of the shortest row that is proposed


@dataclass(frozen=True)
class DevicePlan:
    """What one of `count` devices holds and sends, if each computes a pass of `plan` in a step.

    sharded: whether each holds 1 / count of the base's blocks. pieces: how many devices share a
    row. passes: how many a device computes in a step.
    """

    plan: Plan
    count: int
    sharded: Sharded = "none"
    pieces: int = 1
    passes: int = 1

    @cached_property
    def weights(self) -> tuple[Amount, ...]:
        """The base's weights on a device."""
        if self.sharded == "none":
            return (self.plan.memory.weights,)
        return _sharded_weights(self.plan, self.count)

    @cached_property
    def amounts(self) -> tuple[Amount, ...]:
        """The memory of a device, in amounts that sum to its peak."""
        _, *others = self._of_a_piece.memory.amounts
        rows = [_exchanged_rows(self.plan)] if self.pieces > 1 else []
        return (*self.weights, *others, *rows)

    @property
    def activations(self) -> int:
        """The bytes that a device keeps for the backward pass."""
        return self._of_a_piece.memory.activations.value

    @property
    def peak(self) -> int:
        """The most bytes that a device needs."""
        return sum(each.value for each in self.amounts)

    @cached_property
    def sent(self) -> tuple[Amount, ...]:
        """The bytes that a device sends in a step, by what they are.

        A sum over N devices goes around a ring twice, once to add up and once to tell: each sends
        (N - 1) / N of its bytes each time. What is gathered goes around once.
        """
        n = self.count
        share = ((n - 1) / n, f"{n - 1} / {n}")
        config, trained = self.plan.config, self.plan.trained
        width = config.width if trained.weights else FLOAT32
        gradient = Term.of(
            *(2, "", *share, trained.count, "parameters", width, "bytes"), note="their gradient"
        )
        sent = [amount("adapters" if not trained.weights else "gradient", gradient)]
        if self.sharded == "base":
            sent.append(amount("base's blocks", *(_gathers(self.plan, share, self.passes))))
        if self.pieces > 1:
            sent.append(amount("keys and values", *_row_exchanges(self.plan, self.pieces)))
        return tuple(sent)

    @property
    def sent_bytes(self) -> int:
        """All bytes that a device sends in a step."""
        return sum(each.value for each in self.sent)

    @cached_property
    def _of_a_piece(self) -> Plan:
        """The plan of the tokens of a row that a device computes."""
        if self.pieces == 1:
            return self.plan
        config = self.plan.config
        piece = -(-config.length // self.pieces)
        return replanned(self.plan, replace(config, tokens_per_batch=piece, max_length=piece))


def ways(plan: Plan, count: int, pieces: int = 1) -> Iterator[DevicePlan]:
    """Yield each way to train on `count` devices with a plan's settings, the one that sends less
    first: the base on each, and sharded."""
    yield DevicePlan(plan, count, "none", pieces)
    if count > 1 and can_be_sharded(plan):
        yield DevicePlan(plan, count, "base", pieces)


def best(plan: Plan, count: int, memory: int, pieces: int = 1) -> DevicePlan | None:
    """Return the way with a plan's settings that needs at most `memory` bytes a device and sends
    least, or None."""
    return next((way for way in ways(plan, count, pieces) if way.peak <= memory), None)


def choose_shard(plan: Plan, world_size: int, memory: int) -> Sharded | None:
    """Return what has to be sharded for `plan`, what one process computes, to need at most `memory`
    bytes a process; None if it needs more even so."""
    way = best(plan, world_size, memory)
    return None if way is None else way.sharded


def whole_by_time(plan: Plan, memory: int) -> Plan | None:
    """Return the plan with settings that cost only time which fits whole in `memory` bytes, or
    None."""
    config = plan.config
    same_base = (
        c for c in alternatives(plan) if (c.bits, c.mapped) == (config.bits, config.mapped)
    )
    return next(
        (other for c in same_base if (other := replanned(plan, c)).memory.peak <= memory), None
    )


def can_be_sharded(plan: Plan) -> bool:
    """Return whether a plan's base can be sharded: it is frozen, in blocks, and in memory."""
    config = plan.config
    return not plan.trained.weights and plan.model.depth > 0 and not config.mapped


def can_be_cut(plan: Plan) -> bool:
    """Return whether a plan's rows can be cut into pieces: each block attends, by Veneer's own
    functions."""
    sizes = plan.sizes
    return bool(sizes.blocks) and all(block.structure is not None for block in sizes.blocks)


def least_changes(plan: Plan, count: int, memory: int) -> list[DevicePlan]:
    """Return ways that need at most `memory` bytes a device, each by another change of the plan:
    other settings that cost only time, rows in pieces, fewer bits, more devices, shorter rows.
    Changes that cannot help are left out."""
    changes = [*_other_settings(plan, count, memory)]
    pieces = _in_pieces([plan.config], plan, count, memory)
    if pieces is not None and all(way.pieces == 1 for way in changes):
        changes.insert(sum(x.plan.config.bits == plan.config.bits for x in changes), pieces)
    changes += _more_devices(plan, count, memory)
    return changes + _shorter_rows(plan, count, memory)


def _other_settings(plan: Plan, count: int, memory: int) -> Iterator[DevicePlan]:
    """Yield the gentlest settings that fit, over the base as it is and over fewer bits: with whole
    rows, or else in pieces. Passes are shortened last: each gathers the whole base."""
    by_base: dict[int, list[PlanConfig]] = {}
    for config in alternatives(plan):
        if config.mapped == plan.config.mapped:
            by_base.setdefault(config.base_bits, []).append(config)
    for configs in by_base.values():
        configs.sort(key=lambda config: (-config.tokens_per_batch, SLOWER[config.recompute]))
        each = (best(replanned(plan, config), count, memory) for config in configs)
        way = next((way for way in each if way is not None), None)
        way = way or _in_pieces(configs, plan, count, memory)
        if way is not None:
            yield way


def _in_pieces(
    configs: Iterable[PlanConfig], plan: Plan, count: int, memory: int
) -> DevicePlan | None:
    """Return the first of these settings that fits with rows in pieces, as few as may be."""
    if not can_be_cut(plan):
        return None
    numbers = [number for number in range(2, count + 1) if count % number == 0]
    each = (
        best(replanned(plan, config), count, memory, number)
        for number in numbers
        for config in configs
    )
    return next((way for way in each if way is not None), None)


def _more_devices(plan: Plan, count: int, memory: int) -> list[DevicePlan]:
    """More devices make shares smaller, and nothing else: not what is computed on each."""
    if not can_be_sharded(plan):
        return []
    blocks = _bytes(_terms(plan, plan.sizes.blocks))
    now = DevicePlan(plan, count, "base")
    spare = memory - (now.peak - now.amounts[0].value)
    if spare <= 0:
        return []
    more = DevicePlan(plan, max(count + 1, -(-blocks // spare)), "base")
    return [more] if more.peak <= memory else []


def _shorter_rows(plan: Plan, count: int, memory: int) -> list[DevicePlan]:
    """The longest rows that fit, in passes of no more tokens than now; where nothing says how long
    rows are, they are as long as a pass, which the settings make shorter."""
    config, step = plan.config, LEAST_ROW
    fits: list[DevicePlan] = []
    low, high = 0, 0 if config.max_length is None else (config.max_length - 1) // step
    while low < high:  # steps that fit, or 0; steps above which nothing is tried
        middle = -(-(low + high) // 2)
        length = middle * step
        tokens = min(config.tokens_per_batch, length)
        shorter = replace(config, max_length=length, tokens_per_batch=tokens)
        way = best(replanned(plan, shorter), count, memory)
        if way is None:
            high = middle - 1
        else:
            low, fits = middle, [way]
    return fits


def _sharded_weights(plan: Plan, count: int) -> tuple[Amount, ...]:
    """Return what a device holds of a sharded base: its share, the blocks that are gathered, and
    what is outside of the blocks."""
    config, sizes = plan.config, plan.sizes
    share = [term.times(1 / count, "of") for term in _terms(plan, sizes.blocks)]
    largest = max(sizes.blocks, key=lambda block: _bytes(_terms(plan, [block])))
    gathered = [term.times(GATHERED_BLOCKS, "") for term in _terms(plan, [largest])]
    inside = {layer.path for block in sizes.blocks for layer in block.layers}
    outside = [layer for layer in sizes.description.layers if layer.path not in inside]
    quantized, rest = weight_terms(config, sizes, outside)
    return (
        amount("weights' share", *share),
        amount("a gathered block, and the next", *gathered),
        amount("embedding, head, last norm", *quantized, *rest),
    )


def _gathers(plan: Plan, share: tuple[float, str], passes: int) -> list[Term]:
    """Return what a device sends of the blocks that are gathered: forward, and backward down to the
    lowest block that a gradient must reach."""
    ways = (("forward", 0), ("backward", plan.trained.first_block))
    return [
        replace(term, note=way).times(*share).times(passes, "passes" if passes > 1 else "")
        for way, first in ways
        for term in _terms(plan, plan.sizes.blocks[first:])
    ]


def _exchanged_rows(plan: Plan) -> Amount:
    """Return the keys and values of a whole row in one block, and their gradients."""
    config = plan.config
    return amount(
        "keys and values of a row",
        Term.of(
            *(2, "", config.length, "tokens", 2 * plan.sizes.kv, "numbers", config.width, "bytes"),
            note="of one block, and their gradients",
        ),
    )


def _row_exchanges(plan: Plan, pieces: int) -> list[Term]:
    """Return what a device sends of its piece's keys and values, and of their gradients."""
    config = plan.config
    around = ((pieces - 1) / pieces, f"{pieces - 1} / {pieces}")
    alike = Counter(block.kv for block in plan.sizes.blocks)
    return [
        Term.of(
            *(2, "", count, "layers", *around, config.length, "tokens"),
            *(2 * kv, "numbers", config.width, "bytes"),
            note="and their gradients",
        )
        for kv, count in alike.items()
        if kv
    ]


def _terms(plan: Plan, blocks: Iterable[Block]) -> list[Term]:
    """Return the bytes of blocks' weights; equal blocks share a term."""
    alike: Counter[Term] = Counter()
    for block in blocks:
        quantized, rest = weight_terms(plan.config, plan.sizes, block.layers)
        alike.update(quantized + rest)
    return [term.times(count, "blocks") for term, count in alike.items() if term.value]


def _bytes(terms: Iterable[Term]) -> int:
    return sum(term.value for term in terms)
