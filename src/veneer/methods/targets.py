"""From what a person asks for (`attention`, `q_proj`, `re:...`) to the layers of a given model."""

from __future__ import annotations

from collections.abc import Sequence
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
    modules = dict(model.named_modules())  # once, for a walk takes milliseconds
    stacks = {path for path, module in modules.items() if isinstance(module, nn.ModuleList)}
    attentions = {path for path, module in modules.items() if _is_attention(module)}
    layers = []
    for path, module in modules.items():
        owner, _, name = path.rpartition(".")
        if name == "original" and isinstance(modules[owner], Wrapper):
            continue
        base = module.original if isinstance(module, AdaptedLayer) else module
        if isinstance(base, (*LINEAR, nn.Embedding)):
            block, in_attention = _place(path, stacks, attentions)
            layers.append(Layer(path, base, block, in_attention, module is head))
    return layers


def resolve(model: nn.Module, config: LoRA, layers: Sequence[Layer] | None = None) -> list[Layer]:
    """Return the layers that `config` names in `model`, whose adaptable `layers` may be known.

    Raises TargetError, which lists every target, layer range and pattern that matches nothing.
    """
    return choose(
        adaptable_layers(model) if layers is None else layers,
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


def _is_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return "attention" in kind or "attn" in kind
