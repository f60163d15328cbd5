"""One description of a model: its blocks, and every layer that holds parameters, with its shape."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from veneer.models.blocks import decoder_layers
from veneer.quant.embedding import QuantizedEmbedding
from veneer.quant.stack import QuantizedStack
from veneer.quant.weight import QuantizedLinear

Kind = Literal["linear", "conv1d", "conv2d", "embedding", "norm", "experts", "other"]
FactorKind = Literal["linear", "embedding", "parameter"]
# Modules whose parameters are never multiplied as matrices, whatever their dimensions.
NO_MATRICES = (nn.modules.conv._ConvNd, nn.ParameterDict)


@dataclass(frozen=True, slots=True)
class Layer:
    """A module with parameters, or a single parameter of a module that is no known kind of layer.

    Experts are stacks: 3-D parameters (experts, out, in) of a module that is named after them.
    Others are routers, Mamba's and such.
    """

    path: str
    kind: Kind
    module: nn.Module = field(compare=False, repr=False)
    stored: tuple[int, ...]  # the weight's shape as the module stores it
    transposed: bool  # whether that is (in, out): transformers' Conv1D, embeddings, some experts
    bias: bool
    parameters: int  # all numbers of the layer, without those that an earlier layer shares
    tied_to: str | None  # path of the earlier parameter that its weight is
    block: int | None  # index in the outermost list of blocks, None outside of them
    in_attention: bool
    is_head: bool
    parameter: str | None = None  # the name in its module of a single parameter

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def inner_path(self) -> str:
        """The path within the block; the whole path outside of blocks."""
        if self.block is None:
            return self.path
        return self.path.partition(f".{self.block}.")[2]

    @property
    def is_linear(self) -> bool:
        return self.kind in ("linear", "conv1d")

    @property
    def is_adaptable(self) -> bool:
        """Whether `all`, a name or a pattern may select it: a layer, and no single parameter."""
        return self.is_linear or self.kind in ("embedding", "conv2d")

    @property
    def is_stack(self) -> bool:
        """Whether it is a stack of experts, which `all` selects too."""
        return self.kind == "experts"

    @property
    def experts(self) -> int:
        """The number of experts in a stack, or 0."""
        return self.stored[0] if self.is_stack else 0

    @property
    def is_matrix(self) -> bool:
        """Whether it is a single parameter that can be adapted if its own name is given."""
        matrices = not isinstance(self.module, NO_MATRICES)
        return self.parameter is not None and len(self.stored) in (2, 3) and matrices

    @property
    def factor_kind(self) -> FactorKind:
        """How an adapter of the layer stores its factors."""
        if self.parameter is not None:
            return "parameter"
        return "embedding" if self.kind == "embedding" else "linear"

    @property
    def oriented(self) -> tuple[int, ...]:
        """The weight's shape as (out, in), (experts, out, in) or (out, in, height, width)."""
        if self.transposed:
            *experts, in_, out = self.stored
            return (*experts, out, in_)
        return self.stored

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of a linear layer, (dim, tokens) of an embedding, (size, 1) of a vector.

        Experts are counted as outputs, the window of a convolution as inputs.
        """
        if self.kind == "conv2d":
            return self.stored[0], math.prod(self.stored[1:])
        if len(self.stored) < 2:
            return math.prod(self.stored), 1
        *outputs, in_ = self.oriented
        return math.prod(outputs), in_

    @property
    def out(self) -> int:
        return self.shape[0]

    @property
    def in_(self) -> int:
        return self.shape[1]

    def weights(self) -> list[Tensor]:
        """Return the layer's own parameters, without a quantized weight."""
        own = self.module._parameters
        names = own if self.parameter is None else [self.parameter]
        return [weight for name in names if (weight := own.get(name)) is not None]

    def factor_shapes(
        self, rank: int, *, shared_a: bool = False
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B: (rank, in) and (out, rank), after a dimension of experts if
        there are any; A of a convolution is (rank, in, height, width).

        shared_a: one A (rank, in) for all experts of a stack.
        """
        if self.kind == "conv2d":
            out, *window = self.stored
            return (rank, *window), (out, rank)
        *experts, out, in_ = self.oriented
        return (*(() if shared_a else experts), rank, in_), (*experts, out, rank)


@dataclass(frozen=True)
class ModelDescription:
    """A model's layers, in its order.

    blocks: path of the list of decoder layers, None for a model without lists. depth: its length.
    """

    model: Any = field(compare=False, repr=False)
    layers: tuple[Layer, ...]
    blocks: str | None
    depth: int

    @property
    def config(self) -> Any:
        """The settings of the language model, which may be a part of the whole model's."""
        return self.model.config.get_text_config()

    @cached_property
    def parameters(self) -> int:
        """All parameters; shared ones count once."""
        return sum(layer.parameters for layer in self.layers)

    @cached_property
    def head(self) -> Layer | None:
        """The layer that makes the logits."""
        return next((layer for layer in self.layers if layer.is_head), None)

    @cached_property
    def embedding(self) -> Layer | None:
        """The embedding of tokens."""
        module = self.model.get_input_embeddings()
        return next((layer for layer in self.layers if layer.module is module), None)

    @cached_property
    def quantizable(self) -> tuple[Layer, ...]:
        """The layers that a 4-bit or 8-bit base quantizes: stacks of experts, and every linear one
        but the head."""
        return tuple(
            layer
            for layer in self.layers
            if (layer.is_linear and not layer.is_head)
            or (layer.kind == "experts" and keeps_experts(layer.module))
        )

    @cached_property
    def by_block(self) -> tuple[tuple[Layer, ...], ...]:
        """The layers of each decoder layer."""
        blocks: list[list[Layer]] = [[] for _ in range(self.depth)]
        for layer in self.layers:
            if layer.block is not None and layer.path.startswith(f"{self.blocks}."):
                blocks[layer.block].append(layer)
        return tuple(map(tuple, blocks))


def describe(
    model: nn.Module, original_of: Callable[[nn.Module], nn.Module | None] = lambda module: module
) -> ModelDescription:
    """Return the description of a model, which may be on the meta device.

    original_of: returns the base's own module for one that wraps it, and None for a module that
    does not belong to the base. Paths are the base's own.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    # A model without logits has its head outside of the pretrained body.
    body = getattr(model, "base_model", model) if head is None else model
    inside = {id(module) for module in body.modules()}
    blocks, depth, owners = None, 0, dict[int, str]()
    layers: list[Layer] = []
    decoder = _list_of_blocks(model)
    for place in _places(model, original_of):
        if place.module is decoder and decoder is not None:
            blocks, depth = place.path, len(decoder)
        is_head = place.wrapper is head or id(place.wrapper) not in inside
        layers += _layers_of(place, is_head, owners)
    return ModelDescription(model, tuple(layers), blocks, depth)


@dataclass(frozen=True, slots=True)
class _Place:
    path: str
    wrapper: nn.Module
    module: nn.Module
    block: int | None
    in_attention: bool


def _places(
    model: nn.Module, original_of: Callable[[nn.Module], nn.Module | None]
) -> Iterator[_Place]:
    """Yield every module of the base once, in the order of `named_modules`."""
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module, int | None, bool]] = [("", model, None, False)]
    while waiting:
        path, wrapper, block, in_attention = waiting.pop()
        module = original_of(wrapper)
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        yield _Place(path, wrapper, module, block, in_attention)
        inside = in_attention or (block is not None and _is_attention(module))
        starts = block is None and isinstance(module, nn.ModuleList)
        children: list[tuple[str, nn.Module, int | None, bool]] = [
            (f"{path}.{name}" if path else name, child, int(name) if starts else block, inside)
            for name, child in module._modules.items()
            if child is not None
        ]
        waiting += reversed(children)


def _layers_of(place: _Place, is_head: bool, owners: dict[int, str]) -> Iterator[Layer]:
    """Yield the layers of a module's own parameters. owners: the first path of each parameter so
    far, by its id."""
    module, path = place.module, place.path
    weights: dict[str, Tensor | QuantizedStack] = {
        name: w
        for name, w in (module._parameters | module._modules).items()
        if isinstance(w, Tensor | QuantizedStack)
    }
    paths = {name: f"{path}.{name}" if path else name for name in weights}
    first = {name: owners.setdefault(id(w), paths[name]) for name, w in weights.items()}

    def layer(kind: Kind, names: list[str], stored: tuple[int, ...], **others: Any) -> Layer:
        new = sum(weights[name].numel() for name in names if first[name] == paths[name])
        tied = next((first[name] for name in names if first[name] != paths[name]), None)
        quantized = (
            module.quantized_weight.shape.numel()
            if isinstance(module, QuantizedLinear | QuantizedEmbedding)
            else 0
        )
        settings: dict[str, Any] = {"path": path, "transposed": False} | others
        return Layer(
            kind=kind,
            module=module,
            stored=stored,
            bias=len(names) > 1 or (quantized > 0 and bool(names)),
            parameters=new + quantized,
            tied_to=tied,
            block=place.block,
            in_attention=place.in_attention,
            is_head=is_head,
            **settings,
        )

    names = list(weights)
    if isinstance(module, QuantizedLinear):
        yield layer("linear", names, tuple(module.quantized_weight.shape))
    elif isinstance(module, QuantizedEmbedding):  # nothing adapts it
        yield layer("other", names, tuple(module.quantized_weight.shape))
    elif isinstance(module, nn.Linear) and multiplies(module):
        yield layer("linear", names, tuple(weights["weight"].shape))
    elif isinstance(module, Conv1D | nn.Embedding):
        kind: Kind = "conv1d" if isinstance(module, Conv1D) else "embedding"
        yield layer(kind, names, tuple(weights["weight"].shape), transposed=True)
    elif isinstance(module, nn.Conv2d):
        yield layer("conv2d", names, tuple(weights["weight"].shape))
    elif weights and is_norm(module) and all(w.ndim < 2 for w in weights.values()):
        yield layer("norm", names, tuple(weights[names[0]].shape))
    else:
        has_experts = "experts" in type(module).__name__.lower()
        for name, weight in weights.items():
            stack = weight.ndim == 3 and not isinstance(module, NO_MATRICES)
            yield layer(
                "norm" if is_norm(module) else "experts" if stack and has_experts else "other",
                [name],
                tuple(weight.shape),
                path=paths[name],
                transposed=stack and bool(getattr(module, "is_transposed", False)),
                parameter=name,
            )


def multiplies(layer: nn.Linear) -> bool:
    """Return whether a layer gives W x + b, in training too: by numbers, where its class has a
    forward of its own.

    Falcon's layers do; routers that choose experts too, products in groups, scaled heads do not.
    """
    if type(layer).forward is nn.Linear.forward:
        return True
    W, b = (torch.arange(n, device="cpu", dtype=torch.float32) for n in (6, 3))
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0]], device="cpu")
    probe = copy.copy(layer)
    probe._parameters = {"weight": nn.Parameter(W.view(3, 2))}
    probe._parameters["bias"] = None if layer.bias is None else nn.Parameter(b)
    try:
        with torch.no_grad():
            expected = nn.functional.linear(x, probe.weight, probe.bias)
            for training in (True, False):
                probe.training = training
                if not torch.allclose(probe.forward(x), expected):
                    return False
            return True
    except Exception:  # whatever another kind of layer makes of these shapes
        return False


def keeps_experts(module: nn.Module) -> bool:
    """Return whether a module's 3-D parameters are stacks of experts, by the name of its class."""
    return "experts" in type(module).__name__.lower()


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    # Decoder layers may be named after their attention.
    return ("attention" in name or "attn" in name) and not name.endswith("decoderlayer")


def _list_of_blocks(model: nn.Module) -> nn.ModuleList | None:
    """Return the list of decoder layers: the one of the configuration's length, or else the one
    with the most parameters."""
    if isinstance(model, PreTrainedModel) and (layers := decoder_layers(model)) is not None:
        return layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda layers: sum(w.numel() for w in layers.parameters()), default=None)
