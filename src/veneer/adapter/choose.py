"""Which layers are meant by `attention`, `q_proj` or `re:...`, in a model as in a plan."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from veneer.adapter.patterns import MOST_PATTERNS, Matcher
from veneer.errors import MOST_PROBLEMS, ConfigError, TargetError, joined, nearest, shortened

PRESETS = ("attention", "qv", "mlp", "all")
# Names of projections that make queries or values, alone (q_proj, query, wv) or as one fused layer
# of keys and values (kv_proj). A fused layer of all three is found by its shape instead.
QUERY_OR_VALUE = re.compile(r"^(w?q|query|w?k?v|value)(?![a-z])")


class Adaptable(Protocol):
    """A layer that can be adapted, and where it stands."""

    @property
    def path(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def block(self) -> int | None: ...
    @property
    def in_attention(self) -> bool: ...
    @property
    def is_head(self) -> bool: ...
    @property
    def is_linear(self) -> bool: ...
    @property
    def shape(self) -> tuple[int, int]: ...


Layer = TypeVar("Layer", bound=Adaptable)


def choose(
    layers: Sequence[Layer],
    targets: Sequence[str],
    *,
    blocks: str | None = None,
    patterns: Iterable[str] = (),
    others: Mapping[str, str] | None = None,
) -> list[Layer]:
    """Return the layers that `targets` name, in their order.

    blocks: slices of block indices (0:12, -4:, 3,5,8:) to choose from. patterns: regular
    expressions of paths' ends, each of which must match a chosen layer. others: path and kind of
    what cannot be adapted, for a better message.

    Raises TargetError, which lists every target, slice and pattern that matches nothing.
    """
    if sum(target.startswith("re:") for target in targets) > MOST_PATTERNS:
        raise TargetError(f"There are more than {MOST_PATTERNS:,} patterns among the targets.")
    problems: list[str] = []
    chosen: set[str] = set()
    matcher = Matcher()
    named = _by_name(layers)
    for target in dict.fromkeys(targets):
        try:
            matched = _match(target, layers, named, matcher)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if matched:
            chosen.update(layer.path for layer in matched)
        elif len(problems) < MOST_PROBLEMS:
            problems.append(_why_nothing(target, layers, others or {}))
        else:
            problems.append(f"{shortened(target)!r} matches no layer")
    if blocks is not None:
        depth = 1 + max((layer.block for layer in layers if layer.block is not None), default=-1)
        wanted = _block_range(blocks, depth, problems)
        chosen = {layer.path for layer in layers if layer.path in chosen and layer.block in wanted}
        if not chosen and not problems:
            problems.append(f"layers {blocks!r} leaves none of the targets")
    picked = [layer for layer in layers if layer.path in chosen]
    for pattern in patterns:
        try:
            if any(matcher.at_end(pattern, layer.path) for layer in picked):
                continue
        except ConfigError as error:
            problems.append(str(error))
            continue
        names = {layer.name for layer in picked} if len(problems) < MOST_PROBLEMS else ()
        hint = nearest(pattern, names)
        problems.append(f"the pattern {shortened(pattern)!r} matches none of the targets{hint}")
    if problems:
        raise TargetError(f"These targets do not fit the model: {joined(problems)}.")
    return picked


def _by_name(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Return the layers by each end of their paths: q_proj, self_attn.q_proj, and so on."""
    named: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        end = layer.path
        while end:
            named[end].append(layer)
            end = end.partition(".")[2]
    return named


def _match(
    target: str, layers: Sequence[Layer], named: Mapping[str, list[Layer]], matcher: Matcher
) -> list[Layer]:
    if target.startswith("re:"):
        return [layer for layer in layers if matcher.within(target, layer.path)]
    if target not in PRESETS:
        return named.get(target, [])
    linear = [layer for layer in layers if layer.is_linear and not layer.is_head]
    if target == "all":
        return linear
    if target == "attention":
        return [layer for layer in linear if layer.in_attention]
    if target == "mlp":
        return [x for x in linear if x.block is not None and not x.in_attention]
    attention = [layer for layer in linear if layer.in_attention]
    called = [layer for layer in attention if QUERY_OR_VALUE.match(layer.name.lower())]
    # A layer that is wider than its input makes queries, keys and values in one product.
    return called or [layer for layer in attention if layer.shape[0] > layer.shape[1]]


def _why_nothing(target: str, layers: Sequence[Layer], others: Mapping[str, str]) -> str:
    if target in PRESETS:
        return f"{target!r} finds no such layers in this architecture; name them, or use all"
    for path, kind in others.items():
        if path == target or path.endswith(f".{target}"):
            return f"{target!r} is a {kind}, but only linear layers and embeddings can be adapted"
    names = {layer.name for layer in layers} | {layer.path for layer in layers} | set(PRESETS)
    return f"{shortened(target)!r} matches no layer{nearest(target, names)}"


def _block_range(text: str, depth: int, problems: list[str]) -> set[int]:
    blocks: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)?\s*(:?)\s*(-?\d+)?\s*", piece)
        if not match or not any(match.groups()) or (match[3] and not match[2]):
            problems.append(f"layers has {piece!r}, but takes slices such as 0:12, -4: or 7")
            continue
        first = int(match[1] or 0)
        if match[2]:
            last = int(match[3]) if match[3] else depth
            selected = set(range(depth)[first:last])
        else:
            selected = {first % depth} if depth and -depth <= first < depth else set()
        if not selected:
            problems.append(f"layers has {piece!r}, but the model has blocks 0 to {depth - 1}")
        blocks |= selected
    return blocks
