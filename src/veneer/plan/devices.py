"""A run over several alike devices: what each holds, what it sends in a step, and what fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from veneer.plan.activations import FLOAT32, tokens_of
from veneer.plan.amounts import Amount, Term, amount
from veneer.plan.config import PlanConfig
from veneer.plan.fit import SLOWER, alternatives
from veneer.plan.plan import Plan, replanned
from veneer.plan.row_pieces import keys_and_values, rows_of_others
from veneer.plan.shards import Shards, shards_of

# What of the base is sharded: nothing, or all that is large.
Sharded = Literal["none", "base"]
LEAST_ROW = 64  # tokens of the shortest row that is proposed
# Numbers that are added up over the processes in a step (training/step.py, training/loop.py): label
# tokens and the loss, each with the errors of other processes, and whether to stop.
STEP_NUMBERS, FLOAT64 = 5, 8


@dataclass(frozen=True)
class DevicePlan:
    """What one of `count` devices holds and sends, if each computes a pass of `plan` in a step.

    sharded: whether each holds 1 / count of the base. pieces: how many devices share the tokens of
    a pass. passes: how many there are in a step.
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
        return self._shards.own, self._shards.gathered, self._shards.whole

    @property
    def is_offloaded(self) -> bool:
        """Whether the base is on a device only block by block."""
        return self.plan.config.offload != "none"

    @property
    def copied(self) -> Amount:
        """The bytes that are copied to a device in a step."""
        terms = self._shards.given if self.is_offloaded else []
        return amount("copied", *(term.times(self.passes, "passes") for term in terms))

    @cached_property
    def amounts(self) -> tuple[Amount, ...]:
        """The memory of a device, in amounts that sum to its peak."""
        _, *others = self._of_a_piece.memory.amounts
        rows = [rows_of_others(self.plan, self.pieces)] if self.pieces > 1 else []
        return (*self.weights, *others, *rows)

    @property
    def activations(self) -> int:
        """The bytes that a device keeps for the backward pass."""
        return self._of_a_piece.memory.activations.value

    @property
    def peak(self) -> int:
        """The most bytes that a device needs."""
        return sum(each.value for each in self.amounts)

    @property
    def of_one(self) -> Plan:
        """The plan of what one device computes, with all that it holds."""
        mine = self._of_a_piece
        weights = amount("weights", *(term for each in self.weights for term in each.terms))
        passing = mine.memory.workspace.terms
        if self.pieces > 1:
            passing += rows_of_others(self.plan, self.pieces).terms
        memory = replace(mine.memory, weights=weights, workspace=amount("workspace", *passing))
        return replace(mine, memory=memory)

    @cached_property
    def given(self) -> dict[str, list[Term]]:
        """The bytes that a device gives to exchanges in a step, as `World.sent` counts them."""
        trained = self.plan.trained.count
        # A pass that exchanges by itself says nothing of errors (`World.total`).
        numbers = STEP_NUMBERS - (self.sharded == "base" or self.pieces > 1)
        given = {
            "sum": [
                Term.of(trained, "parameters", FLOAT32, "bytes", note="their gradient"),
                Term.of(numbers, "numbers", FLOAT64, "bytes", note="losses and counts"),
            ]
        }
        if self.sharded == "base":
            given["shards"] = self._shards.given
        if self.pieces > 1:
            given |= keys_and_values(self.plan, self.pieces)
        passes = (self.passes, "passes" if self.passes > 1 else "")
        return {
            kind: terms if kind == "sum" else [term.times(*passes) for term in terms]
            for kind, terms in given.items()
        }

    @cached_property
    def sent(self) -> tuple[Amount, ...]:
        """The bytes that a device sends in a step.

        A sum over N devices goes around a ring twice, once to add up and once to hand out: each
        device sends (N - 1) / N of its bytes each time. What is gathered goes to N - 1 others.
        """
        n, pieces = self.count, self.pieces
        around: dict[str, list[tuple[float, str]]] = {
            "sum": [((n - 1) / n, f"({n - 1} / {n})"), (2, "")],
            "shards": [(n - 1, "others")],
            "keys and values": [(pieces - 1, "others")],
            "gradients of keys and values": [((pieces - 1) / pieces, f"({pieces - 1} / {pieces})")],
        }
        names = {"sum": "what trains", "shards": "the base"}
        return tuple(
            amount(names.get(kind, kind), *(_product(term, around[kind]) for term in terms))
            for kind, terms in self.given.items()
        )

    @property
    def sent_bytes(self) -> int:
        """All bytes that a device sends in a step."""
        return sum(each.value for each in self.sent)

    @cached_property
    def _shards(self) -> Shards:
        plan, count = self.plan, 1 if self.is_offloaded else self.count
        return shards_of(plan.config, plan.sizes, count, plan.trained.first_block)

    @cached_property
    def _of_a_piece(self) -> Plan:
        """The plan of the tokens that a device computes."""
        if self.pieces == 1:
            return self.plan
        config = self.plan.config
        piece = -(-tokens_of(config) // self.pieces)
        length = min(piece, config.length)
        return replanned(self.plan, replace(config, tokens_per_batch=piece, max_length=length))


def ways(plan: Plan, count: int, pieces: int = 1) -> Iterator[DevicePlan]:
    """Yield each way to train on `count` devices with a plan's settings, the one that sends less
    first: the base on each, and sharded."""
    yield DevicePlan(plan, count, "none", pieces)
    if count > 1 and plan.config.offload == "none" and can_be_sharded(plan):
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
        c
        for c in alternatives(plan)
        if (c.bits, c.mapped, c.offload) == (config.bits, config.mapped, config.offload)
    )
    return next(
        (other for c in same_base if (other := replanned(plan, c)).memory.peak <= memory), None
    )


def can_be_sharded(plan: Plan) -> bool:
    """Return whether a plan's base can be sharded: it is frozen, in blocks, and in memory."""
    is_frozen = not plan.trained.weights
    return is_frozen and plan.model.depth > 0 and (plan.on_card or not plan.config.mapped)


def can_be_cut(plan: Plan) -> bool:
    """Return whether a plan's rows can be cut into pieces: each block attends, by Veneer's own
    functions."""
    sizes = plan.sizes
    return bool(sizes.blocks) and all(block.structure is not None for block in sizes.blocks)


def least_changes(plan: Plan, count: int, memory: int) -> list[DevicePlan]:
    """Return ways that need at most `memory` bytes a device, each by another change of the plan:
    other settings that cost only time, rows in pieces, fewer bits, the base offloaded, more
    devices, shorter rows. Changes that cannot help are left out."""
    changes = [*_other_settings(plan, count, memory)]
    pieces = _in_pieces([plan.config], plan, count, memory)
    if pieces is not None and all(way.pieces == 1 for way in changes):
        changes.insert(sum(x.plan.config.bits == plan.config.bits for x in changes), pieces)
    changes += _offloaded(plan, count, memory)
    changes += _more_devices(plan, count, memory)
    return changes + _shorter_rows(plan, count, memory)


def _other_settings(plan: Plan, count: int, memory: int) -> Iterator[DevicePlan]:
    """Yield the gentlest settings that fit, over the base as it is and over fewer bits: with whole
    rows, or else in pieces. Passes are shortened last: each gathers the whole base."""
    by_base: dict[int, list[PlanConfig]] = {}
    for config in alternatives(plan):
        if (config.mapped, config.offload) == (plan.config.mapped, plan.config.offload):
            by_base.setdefault(config.base_bits, []).append(config)
    for configs in by_base.values():
        configs.sort(key=lambda config: (-config.tokens_per_batch, SLOWER[config.recompute]))
        each = (best(replanned(plan, config), count, memory) for config in configs)
        way = next((way for way in each if way is not None), None)
        way = way or _in_pieces(configs, plan, count, memory)
        if way is not None:
            yield way


def _offloaded(plan: Plan, count: int, memory: int) -> Iterator[DevicePlan]:
    """Yield the gentlest settings that fit with the base in the host's memory, in the bits that it
    has."""
    if plan.config.offload != "none" or not can_be_sharded(plan):
        return
    config = replace(plan.config, offload="cpu")
    same_base = (
        c
        for c in alternatives(replanned(plan, config))
        if (c.bits, c.mapped) == (config.bits, config.mapped)
    )
    each = (best(replanned(plan, c), count, memory) for c in same_base)
    way = next((way for way in each if way is not None), None)
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
    if plan.config.offload != "none" or not can_be_sharded(plan):
        return []
    own, *others = DevicePlan(plan, count, "base").weights
    spare = memory - (DevicePlan(plan, count).peak - plan.memory.weights.value) - _bytes(others)
    if spare <= 0:
        return []
    first = max(count + 1, own.value * count // spare)
    # Shares are rounded up, so that it may take one more, or spare a little.
    numbers = range(max(count + 1, first - 1), first + 3)
    each = (DevicePlan(plan, number, "base") for number in numbers)
    return [way for way in each if way.peak <= memory][:1]


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


def _product(term: Term, factors: Iterable[tuple[float, str]]) -> Term:
    for factor in factors:
        term = term.times(*factor)
    return term


def _bytes(amounts: Iterable[Amount]) -> int:
    return sum(each.value for each in amounts)
