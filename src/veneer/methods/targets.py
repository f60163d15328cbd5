"""From what a person asks for (`attention`, `q_proj`, `re:...`) to the layers of a given model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from veneer.frozen.packed import FrozenLinear
from veneer.lowrank.config import LoRA
from veneer.lowrank.layers import AdaptedLayer, Wrapper
from veneer.plan.targets import choose

LINEAR = (nn.Linear, Conv1D, FrozenLinear)


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
        return isinstance(self.module, LINEAR)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of a linear layer, (dim, words) of an embedding."""
        if isinstance(self.module, FrozenLinear):
            return self.module.out_features, self.module.in_features
        rows, columns = self.module.weight.shape  # type: ignore[misc]
        stored_as_out_in = isinstance(self.module, nn.Linear)
        return (rows, columns) if stored_as_out_in else (columns, rows)


def adaptable_layers(model: nn.Module) -> list[Layer]:
    """Return every linear layer, Conv1D and embedding of a model, adapted or not, in its order."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    # Of a model that gives no words, what stands outside of the pretrained body is its head.
    body = getattr(model, "base_model", model) if head is None else model
    inside = {id(module) for module in body.modules()}
    blocks = blocks_of(model)
    attentions = [
        path for path, module in model.named_modules() if _is_attention(module) and path in blocks
    ]
    layers = []
    for path, module in model.named_modules():
        owner = path.rpartition(".")[0]
        if path.endswith(".original") and isinstance(model.get_submodule(owner), Wrapper):
            continue
        base = module.original if isinstance(module, AdaptedLayer) else module
        if isinstance(base, (*LINEAR, nn.Embedding)):
            attention = any(path.startswith(f"{outer}.") for outer in attentions)
            is_head = module is head or id(module) not in inside
            layers.append(Layer(path, base, blocks.get(path), attention, is_head))
    return layers


def resolve(model: nn.Module, config: LoRA) -> list[Layer]:
    """Return the layers that `config` names in `model`.

    Raises TargetError, which lists every target, layer range and pattern that matches nothing.
    """
    return choose(
        adaptable_layers(model),
        config.targets,
        blocks=config.layers,
        patterns=(*config.rank_pattern, *config.alpha_pattern),
        others={path: type(module).__name__ for path, module in model.named_modules()},
    )


def blocks_of(model: nn.Module) -> dict[str, int]:
    """Return {path: index of its block} for every module inside a stack of transformer blocks."""
    return dict(_blocks(model))


def _blocks(model: nn.Module) -> Iterator[tuple[str, int]]:
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
