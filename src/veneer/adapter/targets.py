"""From what a person asks for (`attention`, `q_proj`, `re:...`) to a model's layers, and to the
weights that stay uncovered."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn

from veneer.adapter.config import LoRA
from veneer.adapter.layers import AdaptedLayer
from veneer.adapter.parameters import LoRAParameters
from veneer.adapter.patterns import MOST_PATTERNS, Matcher
from veneer.adapter.virtual_forward import VirtualTokens
from veneer.adapter.wrapper import Wrapper
from veneer.errors import (
    MOST_PROBLEMS,
    ConfigError,
    TargetError,
    joined,
    nearest,
    shortened,
)
from veneer.models.description import Layer, ModelDescription, describe

PRESETS = ("attention", "qv", "mlp", "all")
WHOLE = {"all", "mlp"}  # those that promise every linear layer of a kind
# Names of projections that make queries or values, alone (q_proj, query, wv) or as one fused layer
# of keys and values (kv_proj). A fused layer of all three is found by its shape instead.
QUERY_OR_VALUE = re.compile(r"^(w?q|query|w?k?v|value)(?![a-z])")


def describe_base(model: nn.Module) -> ModelDescription:
    """Return the description of a model's base, whatever adapters it has."""
    return describe(model, _original_of)


def adaptable_layers(model: nn.Module) -> list[Layer]:
    """Return every linear layer, Conv1D, embedding and Conv2d of a model, adapted or not, in its
    order."""
    return [layer for layer in describe_base(model).layers if layer.is_adaptable]


def resolve(model: nn.Module, config: LoRA, layers: Sequence[Layer] | None = None) -> list[Layer]:
    """Return the layers that `config` names in `model`, and parameters named by their own names.

    layers: those of `describe_base`, where they are known already.

    Raises TargetError, which lists every target, layer range and pattern that matches nothing.
    """
    if layers is None:
        layers = describe_base(model).layers
    named = [
        layer
        for layer in layers
        if layer.is_matrix
        and any(f".{layer.path}".endswith(f".{target}") for target in config.targets)
    ]
    return _choose(model, [*(x for x in layers if x.is_adaptable), *named], config)


def uncovered(model: nn.Module, config: LoRA) -> str | None:
    """Return which matrices of the adapted blocks stay as they are though a person who asks for
    `all` or `mlp` may think otherwise, or None: experts that are one parameter, routers, Mamba's
    convolutions. Raises TargetError for targets that match nothing.
    """
    if not WHOLE.intersection(config.targets):
        return None
    layers = describe_base(model).layers
    adapted = resolve(model, config, layers)
    blocks = {layer.block for layer in adapted} - {None}
    in_blocks = [layer for layer in layers if layer.block in blocks and layer.parameters]
    matrices = [x for x in in_blocks if len(x.stored) > 1 and not x.is_adaptable]
    missing = [layer for layer in matrices if layer not in adapted]
    if not missing:
        return None
    share = sum(x.parameters for x in missing) / sum(x.parameters for x in in_blocks)
    names = sorted({layer.inner_path for layer in missing})
    return (
        f"Of the adapted blocks' weights, {share:.1%} are neither linear layers nor embeddings and "
        f"stay as they are: {', '.join(names)}."
    )


def _original_of(module: nn.Module) -> nn.Module | None:
    while isinstance(module, AdaptedLayer | LoRAParameters):
        module = module.original
    # Layers with rows of new tokens cannot be adapted; virtual tokens do not belong to the base.
    return None if isinstance(module, Wrapper | VirtualTokens) else module


def _choose(model: nn.Module, layers: Sequence[Layer], config: LoRA) -> list[Layer]:
    """Return those of the layers that the targets of `config` name, in their order."""
    if sum(target.startswith("re:") for target in config.targets) > MOST_PATTERNS:
        raise TargetError(f"There are more than {MOST_PATTERNS:,} patterns among the targets.")
    problems: list[str] = []
    chosen: set[str] = set()
    matcher = Matcher()
    named = _by_name(layers)
    for target in dict.fromkeys(config.targets):
        try:
            matched = _match(target, layers, named, matcher)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if matched:
            chosen.update(layer.path for layer in matched)
        elif len(problems) < MOST_PROBLEMS:
            problems.append(_why_nothing(target, layers, model))
        else:
            problems.append(f"{shortened(target)!r} matches no layer")
    if config.layers is not None:
        depth = 1 + max((layer.block for layer in layers if layer.block is not None), default=-1)
        blocks = _block_range(config.layers, depth, problems)
        chosen = {layer.path for layer in layers if layer.path in chosen and layer.block in blocks}
        if not chosen and not problems:
            problems.append(f"layers {config.layers!r} leaves none of the targets")
    picked = [layer for layer in layers if layer.path in chosen]
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
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
    if target == "mlp":
        return [x for x in linear if x.block is not None and not x.in_attention]
    attention = [layer for layer in linear if layer.in_attention]
    if target == "attention":
        return attention
    called = [layer for layer in attention if QUERY_OR_VALUE.match(layer.name.lower())]
    # A layer that is wider than its input makes queries, keys and values in one product.
    return called or [layer for layer in attention if layer.out > layer.in_]


def _why_nothing(target: str, layers: Sequence[Layer], model: nn.Module) -> str:
    if target in PRESETS:
        return f"{target!r} finds no such layers in this architecture; name them, or use all"
    for path, module in model.named_modules():
        if path == target or path.endswith(f".{target}"):
            kind = type(module).__name__
            return f"{target!r} is a {kind}, but only linear layers and embeddings can be adapted"
    names = {layer.name for layer in layers} | {layer.path for layer in layers} | set(PRESETS)
    return f"{shortened(target)!r} matches no layer{nearest(target, names)}"


def _block_range(text: str, depth: int, problems: list[str]) -> set[int]:
    blocks: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)?\s*(:?)\s*(-?\d+)?\s*", item)
        if not match or not any(match.groups()) or (match[3] and not match[2]):
            problems.append(f"layers has {item!r}, but takes slices such as 0:12, -4: or 7")
            continue
        first = int(match[1] or 0)
        if match[2]:
            last = int(match[3]) if match[3] else depth
            named = set(range(depth)[first:last])
        else:
            named = {first % depth} if depth and -depth <= first < depth else set()
        if not named:
            problems.append(f"layers has {item!r}, but the model has blocks 0 to {depth - 1}")
        blocks |= named
    return blocks
