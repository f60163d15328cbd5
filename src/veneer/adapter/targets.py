"""From what a person asks for (`attention`, `q_proj`, `re:...`) to the layers of a given model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.adapter.adapter import Adapter
from veneer.adapter.choose import choose
from veneer.adapter.config import LoRA
from veneer.adapter.layers import AdaptedLayer
from veneer.adapter.parameters import AdaptedParameter, LoRAParameters
from veneer.adapter.tokens import TrainedTokens
from veneer.adapter.wrapper import Wrapper
from veneer.quant.weight import QuantizedLinear

LINEAR = (nn.Linear, Conv1D, QuantizedLinear)
# Whose parameters are a layer's weight, or ours.
NO_OWNERS = (
    *LINEAR,
    nn.Embedding,
    nn.modules.conv._ConvNd,
    Wrapper,
    Adapter,
    TrainedTokens,
    nn.ParameterDict,
)


Kind = Literal["linear", "embedding", "conv", "parameter"]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that can be adapted, and where it stands; or a parameter of its `module`."""

    path: str
    module: nn.Module
    block: int | None  # index of the transformer block, None outside of the blocks
    in_attention: bool
    is_head: bool
    parameter: str | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def kind(self) -> Kind:
        if self.parameter is not None:
            return "parameter"
        if isinstance(self.module, nn.Conv2d):
            return "conv"
        return "linear" if isinstance(self.module, LINEAR) else "embedding"

    @property
    def is_linear(self) -> bool:
        return self.kind == "linear"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of a linear layer, a convolution or a parameter, (dim, words) of an embedding.

        Experts are counted as outputs, the window of a convolution as inputs.
        """
        if isinstance(self.module, QuantizedLinear):
            return self.module.out_features, self.module.in_features
        if self.kind in ("conv", "parameter"):
            (*experts, out, _), A = self.factor_shapes(1)[::-1]
            return math.prod((*experts, out)), math.prod(A[len(experts) :])
        rows, columns = self.module.weight.shape  # type: ignore[misc]
        stored_as_out_in = isinstance(self.module, nn.Linear)
        return (rows, columns) if stored_as_out_in else (columns, rows)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B: with one dimension more for experts, and A of a
        convolution (rank, in, height, width)."""
        if self.kind == "conv":
            out, *window = self.module.weight.shape  # type: ignore[misc]
            return (rank, *window), (out, rank)
        if self.parameter is not None:
            *experts, out, in_ = self.module._parameters[self.parameter].shape  # type: ignore[union-attr]
            if experts and getattr(self.module, "is_transposed", False):
                out, in_ = in_, out
            return (*experts, rank, in_), (*experts, out, rank)
        out, in_ = self.shape
        return (rank, in_), (out, rank)


def adaptable_layers(model: nn.Module) -> list[Layer]:
    """Return every linear layer, Conv1D, embedding and Conv2d of a model, adapted or not, in its
    order."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    # Of a model that gives no words, what stands outside of the pretrained body is its head.
    body = getattr(model, "base_model", model) if head is None else model
    inside = {id(module) for module in body.modules()}
    modules = dict(model.named_modules())  # once, for a walk takes milliseconds
    stacks = {path for path, module in modules.items() if isinstance(module, nn.ModuleList)}
    attentions = {path for path, module in modules.items() if _is_attention(module)}
    layers = []
    for path, module in modules.items():
        owner, _, name = path.rpartition(".")
        if name == "original" and isinstance(modules[owner], Wrapper):
            continue
        if isinstance(module, AdaptedParameter):
            continue
        base = module.original if isinstance(module, AdaptedLayer) else module
        if isinstance(base, (*LINEAR, nn.Embedding, nn.Conv2d)):
            block, in_attention = _place(path, stacks, attentions)
            is_head = module is head or id(module) not in inside
            layers.append(Layer(path, base, block, in_attention, is_head))
    return layers


def adaptable_parameters(model: nn.Module) -> list[Layer]:
    """Return what is multiplied with, but by no layer of its own: stacks of experts, routers.

    They are adapted where they are named; no preset and no pattern means them.
    """
    modules = dict(model.named_modules())
    stacks = {path for path, module in modules.items() if isinstance(module, nn.ModuleList)}
    found = []
    for path, module in modules.items():
        owner: nn.Module = module
        if isinstance(module, LoRAParameters):
            owner = module.original
        elif path.endswith(".original") or isinstance(owner, NO_OWNERS):
            continue
        for name, weight in owner._parameters.items():
            if isinstance(weight, Tensor) and weight.ndim in (2, 3):
                full = f"{path}.{name}" if path else name
                block, _ = _place(path, stacks, set())
                found.append(Layer(full, owner, block, False, False, name))
    return found


def resolve(model: nn.Module, config: LoRA, layers: Sequence[Layer] | None = None) -> list[Layer]:
    """Return the layers that `config` names in `model`, and parameters named by their own names.

    layers: the model's adaptable ones and its parameters, where they are known already.

    Raises TargetError, which lists every target, layer range and pattern that matches nothing.
    """
    if layers is None:
        layers = [*adaptable_layers(model), *adaptable_parameters(model)]
    adaptable = [layer for layer in layers if layer.parameter is None]
    named = [
        parameter
        for parameter in layers
        if parameter.parameter is not None
        and any(f".{parameter.path}".endswith(f".{target}") for target in config.targets)
    ]
    return choose(
        [*adaptable, *named],
        config.targets,
        blocks=config.layers,
        patterns=(*config.rank_pattern, *config.alpha_pattern),
        others={path: type(module).__name__ for path, module in model.named_modules()},
    )


def _place(path: str, stacks: set[str], attentions: set[str]) -> tuple[int | None, bool]:
    """Return in which block of the outermost stack a module stands, and if in its attention."""
    block, parent = None, ""
    for name in path.split("."):
        if block is None and parent in stacks:
            block = int(name)
        elif block is not None and parent in attentions:
            return block, True
        parent = f"{parent}.{name}" if parent else name
    return block, False


def blocks_of(model: nn.Module) -> dict[str, int]:
    """Return {path: index of its block} for every module inside a stack of transformer blocks."""
    modules = dict(model.named_modules())
    stacks = {path for path, module in modules.items() if isinstance(module, nn.ModuleList)}
    found = ((path, _place(path, stacks, set())[0]) for path in modules)
    return {path: block for path, block in found if block is not None}


def _is_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return "attention" in kind or "attn" in kind
