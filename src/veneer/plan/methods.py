"""What each method trains: parameters, exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from veneer.errors import ConfigError
from veneer.plan.amounts import Amount, Term, amount
from veneer.plan.config import ADAPTING, PlanConfig
from veneer.plan.shapes import ModelShape, Part
from veneer.plan.targets import choose


@dataclass(frozen=True)
class Adapted:
    """A layer under a low-rank adapter: A (rank, in) and B (out, rank).

    `dropout` says whether inputs of the adapter are dropped out, whose mask is kept too.
    """

    part: Part
    rank: int
    dropout: bool = False


@dataclass(frozen=True)
class Trained:
    """What trains of a model, or beside it.

    weights: the model's own layers that train. adapted: layers under adapters. first_block: the
    lowest block that a gradient must reach, `depth` for none; nothing below it is kept. prefix:
    whether keys and values of virtual tokens, which attention sees before a text's own.
    """

    parameters: Amount
    weights: tuple[Part, ...] = ()
    adapted: tuple[Adapted, ...] = ()
    first_block: int = 0
    prefix: bool = False

    @property
    def count(self) -> int:
        return self.parameters.value

    @property
    def ranks(self) -> int:
        """Sum of the ranks of all adapters."""
        return sum(each.rank for each in self.adapted)


class Adapters(Protocol):
    """Which layers adapters lie on, and with which ranks: what lowrank/config.py's LoRA says."""

    @property
    def targets(self) -> str | Sequence[str]: ...
    @property
    def layers(self) -> str | None: ...
    @property
    def dropout(self) -> float: ...
    @property
    def rank_pattern(self) -> Mapping[str, int]: ...
    @property
    def alpha_pattern(self) -> Mapping[str, float]: ...
    def rank_of(self, path: str) -> int: ...


def adapted_layers(shape: ModelShape, adapters: Adapters) -> tuple[Adapted, ...]:
    """Return the layers of a model that adapters would lie on.

    Raises TargetError, which lists all targets, slices and patterns that match nothing.
    """
    assert not isinstance(adapters.targets, str)  # LoRA has split them
    found = choose(
        shape.adaptable,
        adapters.targets,
        blocks=adapters.layers,
        patterns=(*adapters.rank_pattern, *adapters.alpha_pattern),
        others={part.path: "norm" for part in shape.parts if part.kind == "norm"},
    )
    dropout = adapters.dropout > 0
    return tuple(Adapted(part, adapters.rank_of(part.path), dropout) for part in found)


def trained_by(config: PlanConfig, shape: ModelShape, adapted: tuple[Adapted, ...] = ()) -> Trained:
    """Return what `config.method` trains; `adapted` are the layers under adapters, if any.

    full: all parameters. freeze: the last `trained_blocks` blocks. lora: rank · (in + out) a layer
    (Hu et al. 2021, section 4.1). dora: the same and `out` magnitudes (Liu et al. 2024, section
    4.1). prefix: keys and values of virtual tokens in each layer, or the MLP that makes them (Li
    and Liang 2021, section 4.3). prompt: virtual tokens' embeddings (Lester et al. 2021).

    Raises ConfigError where a method trains nothing of this model.
    """
    tokens = config.virtual_tokens
    if config.method in ADAPTING:
        if not adapted:
            raise ConfigError(f"{config.method} needs layers to adapt.")
        return _adapting(shape, adapted, magnitudes=config.method == "dora")
    if config.method == "prefix":
        return Trained(amount("prefix", *_prefix(config, shape)), prefix=True)
    if config.method == "prompt":
        width = shape.parts[0].out  # of the embedding of words
        return Trained(amount("prompt", Term.of(tokens, "virtual tokens", width, "wide")))
    if config.method == "freeze":
        if config.trained_blocks > shape.depth:
            raise ConfigError(
                f"trained_blocks is {config.trained_blocks}, but there are {shape.depth} blocks."
            )
        first = shape.depth - config.trained_blocks
        weights = tuple(p for p in shape.parts if p.block is not None and p.block >= first)
        each = sum(part.parameters for part in shape.in_block(first))
        term = Term.of(config.trained_blocks, "blocks", each, "parameters")
        return Trained(amount("blocks", term), weights, first_block=first)
    term = Term.of(shape.parameters, "parameters")
    return Trained(amount("all", term), shape.parts)


def _prefix(config: PlanConfig, shape: ModelShape) -> list[Term]:
    tokens, width = config.virtual_tokens, config.prefix_mlp
    made = (shape.depth, "layers", 2, "keys and values")
    if width is None:
        return [Term.of(*made, tokens, "virtual tokens", shape.kv, "wide")]
    return [
        Term.of(tokens, "virtual tokens", shape.kv, "wide", note="embeddings"),
        Term.of(width, "wide", shape.kv + 1, "inputs and bias", note="the MLP's first layer"),
        Term.of(
            *(*made, shape.kv, "wide", width + 1, "inputs and bias"), note="the MLP's second layer"
        ),
    ]


def _adapting(shape: ModelShape, adapted: tuple[Adapted, ...], *, magnitudes: bool) -> Trained:
    alike = Counter((each.part.name, each.rank, each.part.shape) for each in adapted)
    terms = []
    for (name, rank, (out, in_)), count in alike.items():
        terms.append(Term.of(count, "layers", rank, "rank", in_ + out, "in + out", note=name))
    if magnitudes:
        total = sum(each.part.out for each in adapted)
        terms.append(Term.of(total, "magnitudes", note="one for each output"))
    # An adapter outside of the blocks lies before them all, but for the head.
    first = min(
        shape.depth if each.part.is_head else 0 if each.part.block is None else each.part.block
        for each in adapted
    )
    return Trained(amount("adapters", *terms), adapted=adapted, first_block=first)
