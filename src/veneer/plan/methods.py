"""The parameters that each method trains, counted exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from veneer.adapter.config import LoRA
from veneer.adapter.method import Method
from veneer.adapter.report import TargetLine, target_lines
from veneer.adapter.targets import check_parameters
from veneer.adapter.unfreeze import replaced_weights
from veneer.errors import ConfigError
from veneer.models.description import Layer
from veneer.plan.amounts import Amount, Term, amount
from veneer.plan.config import ADAPTING, PlanConfig
from veneer.plan.sizes import Block, Sizes


@dataclass(frozen=True)
class Trained:
    """What trains of a model, or beside it.

    weights: the model's own layers that train. adapted: layers with adapters. first_block: the
    lowest block that a gradient must reach, the number of blocks for none; nothing below it is
    kept. prefix: whether keys and values of virtual tokens train. beside: numbers of adapters that
    do not train. each: how many numbers each weight has that trains; they sum to `count`.
    """

    parameters: Amount
    weights: tuple[Layer, ...] = ()
    adapted: tuple[TargetLine, ...] = ()
    first_block: int = 0
    prefix: bool = False
    beside: int = 0
    each: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        return self.parameters.value

    @property
    def trains_head(self) -> bool:
        return any(layer.is_head for layer in self.weights)

    @cached_property
    def own_paths(self) -> set[str]:
        """Paths of the model's own layers that train."""
        return {layer.path for layer in self.weights}

    @cached_property
    def lines(self) -> dict[str, TargetLine]:
        """Layers with adapters, by path."""
        return {line.path: line for line in self.adapted}

    def counted(self, blocks: Iterable[Block]) -> list[tuple[Block, int]]:
        """Return the first of all blocks that are equal and train alike, and how many they are."""
        alike: dict[Hashable, list[Block]] = {}
        for block in blocks:
            alike.setdefault((block.kind, self._ways(block)), []).append(block)
        return [(first, 1 + len(others)) for first, *others in alike.values()]

    def _ways(self, block: Block) -> Hashable:
        """Return for each layer of a block whether it trains, and how large its adapter is."""
        lines, own = self.lines, self.own_paths
        return tuple(
            (x.path in own, (line := lines.get(x.path)) and (line.rank, line.has_start))
            for x in block.layers
        )


def trained_by(config: PlanConfig, sizes: Sizes, adapted: tuple[TargetLine, ...] = ()) -> Trained:
    """Return what `config.method` trains; `adapted` are the layers with adapters, if any.

    full: all parameters. freeze: the last `trained_blocks` blocks, and norms and head where asked
    for. lora: rank · (in + out) a layer (Hu et al. 2021, section 4.1). dora: the same and `out`
    magnitudes (Liu et al. 2024, section 4.1). prefix: keys and values of virtual tokens in each
    layer, or the MLP that makes them (Li and Liang 2021, section 4.3). prompt: virtual tokens'
    embeddings (Lester et al. 2021).

    Raises ConfigError for a method that does not suit this model.
    """
    if config.method in ADAPTING:
        if not adapted:
            raise ConfigError(f"{config.method} needs layers to adapt.")
        if config.method == "dora":
            layers = [line.layer for line in adapted]
            check_parameters(replace(adapted[0].config, dora=True), layers)
        return _adapting(sizes, adapted, magnitudes=config.method == "dora")
    if config.method == "prefix":
        terms = _prefix(config, sizes)
        each = [term.value for term in terms]
        if (width := config.prefix_mlp) is not None:  # whose two layers have biases
            tokens, first, second = each
            each = [tokens, first - width, width, second - (bias := second // (width + 1)), bias]
        return Trained(amount("prefix", *terms), prefix=True, each=tuple(each))
    if config.method == "prompt":
        tokens, width = config.virtual_tokens, sizes.prompt_shape[1]
        term = Term.of(tokens, "virtual tokens", width, "wide")
        return Trained(amount("prompt", term), each=(term.value,))
    if config.method == "freeze":
        return _freezing(config, sizes)
    description = sizes.description
    term = Term.of(description.parameters, "parameters")
    every = tuple(weight.numel() for weight in description.model.parameters())
    return Trained(amount("all", term), description.layers, each=every)


def _freezing(config: PlanConfig, sizes: Sizes) -> Trained:
    description = sizes.description
    method = Method(
        "freeze",
        trained_blocks=config.trained_blocks,
        train_head=config.train_head,
        train_norms=config.train_norms,
    )
    trained = {id(w): w.numel() for w in replaced_weights(description.model, method).values()}
    layers = tuple(
        layer for layer in description.layers if any(id(w) in trained for w in layer.weights())
    )
    first = description.depth - config.trained_blocks
    each = sum(layer.parameters for layer in sizes.blocks[first].layers)
    blocks = sum(layer.parameters for block in sizes.blocks[first:] for layer in block.layers)
    alike = blocks == config.trained_blocks * each
    count, numbers = (config.trained_blocks, each) if alike else (1, blocks)
    terms = [Term.of(count, "blocks" if alike else "", numbers, "parameters")]
    if rest := sum(trained.values()) - blocks:
        terms.append(Term.of(rest, "parameters", note="norms and head"))
    # Below the blocks, a gradient must reach the lowest norm, or the embedding.
    inside = {layer.path for block in sizes.blocks for layer in block.layers}
    below = [layer for layer in layers if layer.path not in inside and layer.kind == "embedding"]
    lowest = 0 if config.train_norms or below else first
    every = tuple(trained.values())
    return Trained(amount("blocks", *terms), layers, first_block=lowest, each=every)


def _prefix(config: PlanConfig, sizes: Sizes) -> list[Term]:
    layers, two, heads, _, head_dim = sizes.prefix_shape
    tokens = config.virtual_tokens
    made = (layers, "layers", two, "keys and values")
    width, hidden = heads * head_dim, config.prefix_mlp
    if hidden is None:
        return [Term.of(*made, tokens, "virtual tokens", width, "wide")]
    return [
        Term.of(tokens, "virtual tokens", width, "wide", note="embeddings"),
        Term.of(hidden, "wide", width + 1, "inputs and bias", note="the MLP's first layer"),
        Term.of(
            *(*made, width, "wide", hidden + 1, "inputs and bias"), note="the MLP's second layer"
        ),
    ]


def _adapting(sizes: Sizes, adapted: tuple[TargetLine, ...], *, magnitudes: bool) -> Trained:
    alike = Counter((line.layer.name, line.rank, _factors(line)) for line in adapted)
    terms = [
        Term.of(count, "layers", rank, "rank", *numbers, note=name)
        for (name, rank, numbers), count in alike.items()
    ]
    if magnitudes:
        total = sum(line.out for line in adapted)
        terms.append(Term.of(total, "magnitudes", note="one for each output"))
    first = min(sizes.block_of(line.layer) for line in adapted)
    beside = sum(sum(x.factors) * (1 + x.has_start) - x.trained_factors for x in adapted)
    each = [n for x in adapted for n in _trained_weights(x)]
    each += [x.out for x in adapted] if magnitudes else []
    return Trained(
        amount("adapters", *terms),
        adapted=adapted,
        first_block=first,
        beside=beside,
        each=tuple(each),
    )


def _trained_weights(line: TargetLine) -> tuple[int, ...]:
    """Return the numbers of each factor that trains."""
    return (line.trained_factors,) if line.config.lora_fa else line.factors


def _factors(line: TargetLine) -> tuple[int, str]:
    """Return how many numbers train for each rank of a layer, and their name."""
    names = "in + out"
    if line.config.lora_fa:
        names = "tokens" if line.layer.kind == "embedding" else "out"
    return line.trained_factors // line.rank, names


def adapted_layers(sizes: Sizes, config: LoRA) -> tuple[TargetLine, ...]:
    """Return the layers that would get adapters, as `attach` finds them.

    Raises TargetError, which lists all targets, slices and patterns that match nothing.
    """
    return target_lines(sizes.description.model, config)
