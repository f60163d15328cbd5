"""An adapter's layers as a base keeps them, where a file has them in another way.

What is a layer in a file may be one parameter here: transformers 5 keeps all experts of a block as
stacks, which older files adapt one by one (`experts.0.down_proj`, `block_sparse_moe.experts.0.w1`).
PEFT can adapt a linear layer by its weight's name, which is the same as adapting the layer.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from veneer.adapter.config import LoRA
from veneer.adapter.targets import resolve
from veneer.errors import AdapterError, joined, listed
from veneer.formats.base_structure import BaseStructure, targets_for
from veneer.formats.stacks import as_one
from veneer.formats.state import AdapterState, StoredLayer
from veneer.lowrank.formula import Factors
from veneer.models.description import Layer

WEIGHT = ".weight"


@dataclass(frozen=True)
class _Member:
    """The adapter of one expert's projection, which is one of several that a stack has in turn."""

    layer: StoredLayer
    scaling: float
    expert: int
    projection: int  # 0 for gate, 1 for up where a stack holds both


def fit(state: AdapterState, base: BaseStructure) -> AdapterState:
    """Return the adapter with the layers and stacks that `base` has; it computes the same.

    Layers that the base lacks in whatever form stay as they are, and `validate` names them. Raises
    AdapterError for a file of single experts that lacks some which its settings name.
    """
    config = state.config
    if not isinstance(config, LoRA):
        return state
    fitted, members, ways = list[StoredLayer](), defaultdict[str, list[_Member]](list), None
    moved: dict[str, str] = {}  # by the new path of a layer, its path in the file
    for layer in state.layers():
        path = layer.path
        own = _of_base(layer, base)
        if own is None and layer.kind == "linear":
            ways = ways or _Ways.of(base)
            own = ways.renamed(layer)
            if own is None and (stack := ways.stack_of(layer)) is not None:
                name, expert, projection = stack
                member = _Member(layer, config.scaling_of(path), expert, projection)
                members[name].append(member)
                continue
        fitted.append(own or layer)
        moved[fitted[-1].path] = path
    _refuse_doubles(fitted, members)
    if not members and all(new == old for new, old in moved.items()):
        return state.with_layers(fitted)
    if ways is not None and members:
        _refuse_incomplete(config, moved, members, ways)
    ranks = {new: config.rank_of(old) for new, old in moved.items()}
    alphas = {new: config.alpha_of(old) for new, old in moved.items()}
    for path, own_members in sorted(members.items()):
        assert ways is not None
        stack_layer = fused(base.matrices[path], own_members, ways.projections[path])
        rank, scaling = stack_layer.A.shape[-2], own_members[0].scaling
        ranks[path] = rank
        alphas[path] = scaling * (rank**0.5 if config.rslora else rank)
        fitted.append(stack_layer)
    config = replace(
        config,
        targets=targets_for({layer.path for layer in fitted}, base),
        layers=None,
        rank_pattern={path: rank for path, rank in ranks.items() if rank != config.rank},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != config.alpha},
    )
    tensors = {key: tensor for layer in fitted for key, tensor in layer.tensors().items()}
    own_keys = {key for layer in state.layers() for key in layer.tensors()}
    left = {key: tensor for key, tensor in state.tensors.items() if key not in own_keys}
    return replace(state, config=config, tensors=tensors | left)


def fused(stack: Layer, members: Sequence[_Member], projections: int) -> StoredLayer:
    """Return one adapter of a stack that adds to each expert what the members add: A of an expert's
    projections below each other, and B as blocks on the diagonal (`as_one`).

    The scaling is the first member's. What a member has of its own is folded into its B, and lower
    ranks and experts without an adapter are filled up with zeros.
    """
    experts, out, in_ = stack.oriented
    like = members[0].layer.A
    factors = []
    for projection in range(projections):
        own = [member for member in members if member.projection == projection]
        rank = max((len(member.layer.A) for member in own), default=0)
        A, B = like.new_zeros(experts, rank, in_), like.new_zeros(experts, out // projections, rank)
        for member in own:
            layer, factor = member.layer, member.scaling / members[0].scaling
            A[member.expert, : len(layer.A)] = layer.A
            B[member.expert, :, : len(layer.A)] = layer.B * factor
        factors.append((A, B))
    return StoredLayer(stack.path, *as_one(factors), "parameter")


def _refuse_doubles(
    fitted: Sequence[StoredLayer], members: Mapping[str, Sequence[_Member]]
) -> None:
    """Raise AdapterError if a file adapts a layer of the base twice: as a stack and expert by
    expert, or under two names. Only one of them would be left."""
    own = Counter(layer.path for layer in fitted)
    problems = [
        f"{path} has an adapter as a stack, and so have its experts, such as {each[0].layer.path}"
        for path, each in members.items()
        if own[path]
    ]
    problems += [f"{path} has {n} adapters, under {n} names" for path, n in own.items() if n > 1]
    if problems:
        raise AdapterError(
            f"This adapter adapts layers twice: {joined(problems)}. Leave one of both in the file."
        )


def _refuse_incomplete(
    config: LoRA,
    moved: Mapping[str, str],
    members: Mapping[str, Sequence[_Member]],
    ways: _Ways,
) -> None:
    """Raise AdapterError if a file of single experts lacks weights that its settings name, or has
    others: experts without weights would be filled up with zeros.

    The settings are resolved over the base as the file knows it, with each expert's projections as
    layers. moved: the paths in the file of the layers that are no expert's, by path in the base.
    """
    base = ways.base
    own = base.layers | base.matrices
    if not moved.keys() <= own.keys():
        return  # `validate` names the others
    experts = {member.layer.path: path for path, each in members.items() for member in each}
    layers = [layer for path, layer in base.layers.items() if path not in moved]
    layers += [_as_linear(own[path], old) for path, old in moved.items()]
    layers += ways.every_expert(experts)
    there = {*moved.values(), *experts}
    try:
        named = {layer.path for layer in resolve(base.model, config, layers)}
    except ValueError as error:
        problems = [str(error).rstrip(".")]
    else:
        problems = [f"{x} has weights, but is not among the targets" for x in sorted(there - named)]
        if missing := sorted(named - there):
            problems.append(f"weights are missing for {listed(missing)}")
    if problems:
        raise AdapterError(f"This adapter does not fit the base: {joined(problems)}.")


def _as_linear(layer: Layer, path: str) -> Layer:
    return replace(layer, path=path, kind="linear", parameter=None)


@dataclass(frozen=True)
class _Ways:
    """How transformers turns the keys of older checkpoints into a base's, by its own rules."""

    base: BaseStructure
    renamings: list[WeightRenaming]
    converters: list[WeightConverter]
    projections: dict[str, int]  # by the path of a stack that was seen, how many each expert has

    @classmethod
    def of(cls, base: BaseStructure) -> _Ways:
        transforms = get_model_conversion_mapping(base.model)
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        return cls(base, renamings, [c for c in converters if _stacks(c)], {})

    def renamed(self, layer: StoredLayer) -> StoredLayer | None:
        """Return the layer under the name that the base has for it, or None if it has none."""
        key, _ = rename_source_key(layer.path + WEIGHT, self.renamings, [])
        if key == layer.path + WEIGHT:
            return None
        return _of_base(replace(layer, path=key.removesuffix(WEIGHT)), self.base)

    def every_expert(self, experts: Mapping[str, str]) -> list[Layer]:
        """Return all projections of all experts as layers, with their paths in the file.

        experts: the stacks' paths by the paths of those in the file, which say how it names them.
        """
        stacks = [layer for layer in self.base.matrices.values() if layer.is_stack]
        forms = set()
        for path, name in experts.items():
            blocks, _, inner = path.partition(f".{self.base.matrices[name].block}.")
            forms.add((blocks, inner.rsplit(".", 2)[0]))
        sources = {source for converter in self.converters for source in converter.source_patterns}
        names = {source.removesuffix(WEIGHT).rpartition(".")[2] for source in sources}
        layers = []
        for (blocks, owner), name in itertools.product(forms, names):
            for stack in stacks:
                owner_path = f"{blocks}.{stack.block}.{owner}"
                key = f"{owner_path}.0.{name}{WEIGHT}"
                if rename_source_key(key, self.renamings, self.converters)[0] == stack.path:
                    paths = (f"{owner_path}.{expert}.{name}" for expert in range(stack.experts))
                    layers += [_as_linear(stack, path) for path in paths]
        return layers

    def stack_of(self, layer: StoredLayer) -> tuple[str, int, int] | None:
        """Return the path of the stack, the expert and the projection that a layer is of, or None
        if it is no expert's, or holds what no stack can have."""
        key, pattern = rename_source_key(layer.path + WEIGHT, self.renamings, self.converters)
        stack = self.base.matrices.get(key)
        number = re.search(r"\.(\d+)\.[^.]+$", layer.path)
        if pattern is None or stack is None or number is None or len(stack.oriented) != 3:
            return None
        sources = next(c.source_patterns for c in self.converters if pattern in c.source_patterns)
        experts, out, in_ = stack.oriented
        shapes = tuple(layer.A.shape[1:]), tuple(layer.B.shape[:1])
        fits = shapes == ((in_,), (out // len(sources),)) and len(layer.A) == layer.B.shape[-1]
        plain = layer.magnitude is None and layer.bias is None and layer.start is None
        if not fits or not plain or int(number[1]) >= experts:
            return None
        self.projections[key] = len(sources)
        return key, int(number[1]), sources.index(pattern)


def _stacks(converter: WeightConverter) -> bool:
    """Return whether a converter does nothing but stack experts, and lay their projections below
    each other."""
    operations = converter.operations
    return (
        len(converter.target_patterns) == 1
        and any(isinstance(operation, MergeModulelist) for operation in operations)
        and all(
            isinstance(o, MergeModulelist) or (type(o) is Concatenate and o.dim == 1)
            for o in operations
        )
    )


def _of_base(layer: StoredLayer, base: BaseStructure) -> StoredLayer | None:
    """Return a stored layer as the one that the base has for it, or None if it has none."""
    path = layer.path
    if layer.kind != "parameter":
        if path in base.layers:
            return layer
        return _as_parameter(replace(layer, path=path + WEIGHT), base.matrices)
    linear = base.layers.get(path.removesuffix(WEIGHT))
    if path.endswith(WEIGHT) and linear is not None and linear.kind == "linear":
        return replace(layer, path=path.removesuffix(WEIGHT), kind="linear")
    return _as_parameter(layer, base.matrices)


def _as_parameter(layer: StoredLayer, matrices: Mapping[str, Layer]) -> StoredLayer | None:
    own = matrices.get(layer.path)
    if own is None or layer.is_embedding:
        return None
    A, B = _as_deep(own, (layer.A, layer.B))
    return replace(layer, A=A, B=B, kind="parameter")


def _as_deep(own: Layer, factors: Factors) -> Factors:
    """Return factors of a single expert with the dimension that its stack has for experts."""
    A, B = factors
    if len(own.stored) == 3 and own.oriented[0] == 1 and B.ndim == 2:
        return A[None], B[None]
    return A, B
