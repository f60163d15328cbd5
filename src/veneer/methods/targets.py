"""From what a person asks for (`attention`, `q_proj`, `re:...`) to the layers of a given model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from veneer.errors import TargetError, nearest
from veneer.lowrank.config import LoRA
from veneer.lowrank.layers import AdaptedLayer, Wrapper

PRESETS = ("attention", "qv", "mlp", "all")
# Names of projections that make queries or values, alone (q_proj, query, wv) or as one fused layer
# of keys and values (kv_proj). A fused layer of all three is found by its shape instead.
QUERY_OR_VALUE = re.compile(r"^(w?q|query|w?k?v|value)(?![a-z])")


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that can be adapted, and where it stands."""

    path: str
    module: nn.Module
    block: int | None  # index of the transformer block, None outside of the blocks
    in_attention: bool
    is_head: bool

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def is_linear(self) -> bool:
        return isinstance(self.module, nn.Linear | Conv1D)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of a linear layer, (dim, words) of an embedding."""
        rows, columns = self.module.weight.shape  # type: ignore[misc]
        stored_as_out_in = isinstance(self.module, nn.Linear)
        return (rows, columns) if stored_as_out_in else (columns, rows)


def adaptable_layers(model: nn.Module) -> list[Layer]:
    """Return every linear layer, Conv1D and embedding of a model, adapted or not, in its order."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    blocks = dict(_blocks(model))
    attentions = [
        path for path, module in model.named_modules() if _is_attention(module) and path in blocks
    ]
    layers = []
    for path, module in model.named_modules():
        owner = path.rpartition(".")[0]
        if path.endswith(".original") and isinstance(model.get_submodule(owner), Wrapper):
            continue
        base = module.original if isinstance(module, AdaptedLayer) else module
        if isinstance(base, nn.Linear | Conv1D | nn.Embedding):
            attention = any(path.startswith(f"{outer}.") for outer in attentions)
            layers.append(Layer(path, base, blocks.get(path), attention, module is head))
    return layers


def resolve(model: nn.Module, config: LoRA) -> list[Layer]:
    """Return the layers that `config` names in `model`.

    Raises TargetError, which lists every target, layer range and pattern that matches nothing.
    """
    layers = adaptable_layers(model)
    modules = dict(model.named_modules())
    problems: list[str] = []
    chosen: set[str] = set()
    for target in config.targets:
        matched = _match(target, layers)
        if isinstance(matched, str):
            problems.append(matched)
        elif matched:
            chosen.update(layer.path for layer in matched)
        else:
            problems.append(_why_nothing(target, layers, modules))
    if config.layers is not None:
        depth = 1 + max((layer.block for layer in layers if layer.block is not None), default=-1)
        wanted = _block_range(config.layers, depth, problems)
        chosen = {layer.path for layer in layers if layer.path in chosen and layer.block in wanted}
        if not chosen and not problems:
            problems.append(f"layers {config.layers!r} leaves none of the targets")
    picked = [layer for layer in layers if layer.path in chosen]
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(re.match(rf"(.*\.)?({pattern})$", layer.path) for layer in picked):
            hint = nearest(pattern, {layer.name for layer in picked})
            problems.append(f"the pattern {pattern!r} matches none of the targets{hint}")
    if problems:
        raise TargetError("These targets do not fit the model: " + "; ".join(problems) + ".")
    return picked


def _match(target: str, layers: list[Layer]) -> list[Layer] | str:
    linear = [layer for layer in layers if layer.is_linear and not layer.is_head]
    if target == "all":
        return linear
    if target == "attention":
        return [layer for layer in linear if layer.in_attention]
    if target == "mlp":
        return [x for x in linear if x.block is not None and not x.in_attention]
    if target == "qv":
        attention = [layer for layer in linear if layer.in_attention]
        named = [layer for layer in attention if QUERY_OR_VALUE.match(layer.name.lower())]
        # A layer that is wider than its input makes queries, keys and values in one product.
        return named or [layer for layer in attention if layer.shape[0] > layer.shape[1]]
    if target.startswith("re:"):
        try:
            pattern = re.compile(target[3:])
        except re.error as error:
            return f"{target!r} is no regular expression ({error})"
        return [layer for layer in layers if pattern.search(layer.path)]
    return [x for x in layers if x.path == target or x.path.endswith(f".{target}")]


def _why_nothing(target: str, layers: list[Layer], modules: dict[str, nn.Module]) -> str:
    if target in PRESETS:
        return f"{target!r} finds no such layers in this architecture; name them, or use all"
    for path, module in modules.items():
        if path == target or path.endswith(f".{target}"):
            kind = type(module).__name__
            return f"{target!r} is a {kind}, but only linear layers and embeddings can be adapted"
    names = {layer.name for layer in layers} | {layer.path for layer in layers} | set(PRESETS)
    return f"{target!r} matches no layer{nearest(target, names)}"


def _block_range(text: str, depth: int, problems: list[str]) -> set[int]:
    wanted: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)?\s*(:?)\s*(-?\d+)?\s*", part)
        if not match or not any(match.groups()) or (match[3] and not match[2]):
            problems.append(f"layers has {part!r}, but takes slices such as 0:12, -4: or 7")
            continue
        first = int(match[1] or 0)
        if match[2]:
            last = int(match[3]) if match[3] else depth
            found = set(range(depth)[first:last])
        else:
            found = {first % depth} if depth and -depth <= first < depth else set()
        if not found:
            problems.append(f"layers has {part!r}, but the model has blocks 0 to {depth - 1}")
        wanted |= found
    return wanted


def _blocks(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield (path, index of its block) for every module inside a stack of transformer blocks."""
    stacks: list[str] = []
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{stack}.") for stack in stacks)
        if isinstance(module, nn.ModuleList) and not nested:
            stacks.append(path)
            for index, block in enumerate(module):
                for inner, _ in block.named_modules():
                    yield ".".join(filter(None, (path, str(index), inner))), index


def _is_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return "attention" in kind or "attn" in kind
