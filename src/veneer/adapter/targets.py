"""From what a person asks for (`attention`, `q_proj`, `re:...`) to a model's layers, and to the
weights that stay uncovered."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from veneer.adapter.config import LoRA
from veneer.adapter.layers import AdaptedLayer
from veneer.adapter.parameters import LoRAParameters
from veneer.adapter.patterns import MOST_PATTERNS, ByPath, Matcher
from veneer.adapter.virtual_forward import VirtualTokens
from veneer.adapter.wrapper import Wrapper
from veneer.errors import (
    MOST_PROBLEMS,
    ConfigError,
    TargetError,
    joined,
    listed,
    nearest,
    share_text,
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
    candidates = [
        layer
        for layer in layers
        if layer.is_adaptable
        or layer.is_stack
        or (layer.is_matrix and is_named(config, layer.path))
    ]
    return _choose(model, candidates, config)


def is_named(config: LoRA, path: str) -> bool:
    """Return whether a target is the end of a path, and no preset or pattern."""
    return any(f".{path}".endswith(f".{target}") for target in config.targets)


def check_parameters(config: LoRA, targets: Sequence[Layer]) -> None:
    """Raise ConfigError for DoRA or dropout over parameters, such as stacks of experts.

    A gain for each row of each expert could be trained, but its norm reads every expert's weights
    in each step, also of those that no token is routed to; and PEFT has neither over parameters.
    """
    parameters = [layer.path for layer in targets if layer.parameter is not None]
    reasons = {
        "DoRA": (config.dora, "its norms would read the weights of all experts in each step"),
        "dropout": (config.dropout, "no format and no other program has it there"),
    }
    for method, (is_set, reason) in reasons.items():
        if is_set and parameters:
            raise ConfigError(
                f"{method} cannot be over parameters such as stacks of experts ({reason}): "
                f"{listed(parameters)}. Name the layers instead: attention, or a pattern such as "
                "re:_proj$, which selects layers only."
            )


def with_expert_ranks(config: LoRA, targets: Sequence[Layer]) -> LoRA:
    """Return the settings with a rank in `rank_pattern` for each stack of experts in `targets` that
    no pattern matches: `expert_rank`, or the rank divided by the number of experts."""
    own = ByPath[int | None](config.rank_pattern, None)
    ranks = {
        layer.path: config.expert_rank or max(1, config.rank // layer.experts)
        for layer in targets
        if layer.is_stack and own.of(layer.path) is None
    }
    if not ranks:
        return config
    same_end: dict[str, list[str]] = defaultdict(list)
    for layer in targets:
        same_end[_last_names(layer.path)].append(layer.path)
    pattern: dict[str, int] = {}
    for path, rank in ranks.items():
        end = _last_names(path)
        alike = all(ranks.get(other) == rank for other in same_end[end])
        pattern[end if alike else path] = rank
    return replace(config, rank_pattern=config.rank_pattern | pattern)


def _last_names(path: str) -> str:
    """Return the last two names of a path, such as experts.down_proj."""
    return ".".join(path.split(".")[-2:])


def uncovered(model: nn.Module, config: LoRA) -> str | None:
    """Return which matrices of the adapted blocks stay as they are though a person who asks for
    `all` or `mlp` may think otherwise, or None: routers, Mamba's convolutions. Raises TargetError
    for targets that match nothing.
    """
    if not WHOLE.intersection(config.targets):
        return None
    layers = describe_base(model).layers
    adapted = resolve(model, config, layers)
    blocks = {layer.block for layer in adapted} - {None}
    in_blocks = [layer for layer in layers if layer.block in blocks and layer.parameters]
    matrices = [
        layer
        for layer in in_blocks
        if len(layer.stored) > 1 and not layer.is_adaptable and not layer.name.endswith("bias")
    ]
    missing = [layer for layer in matrices if layer not in adapted]
    if not missing:
        return None
    share = sum(x.parameters for x in missing) / sum(x.parameters for x in in_blocks)
    names = sorted({layer.inner_path for layer in missing})
    return (
        f"Of the adapted blocks' weights, {share_text(share)} are neither linear layers, "
        f"embeddings nor experts and stay as they are: {', '.join(names)}."
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
    if not any(layer.is_stack for layer in picked):
        given = {"expert_rank": config.expert_rank, "shared_expert_a": config.shared_expert_a}
        problems += [
            f"{name} is {value!r}, but no stack of experts is among the targets"
            for name, value in given.items()
            if value
        ]
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
        return [x for x in layers if x.is_adaptable and matcher.within(target, x.path)]
    if target not in PRESETS:
        return named.get(target, [])
    whole = [layer for layer in layers if (layer.is_linear or layer.is_stack) and not layer.is_head]
    if target == "all":
        return whole
    if target == "mlp":
        return [x for x in whole if x.block is not None and not x.in_attention]
    attention = [layer for layer in whole if layer.is_linear and layer.in_attention]
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
