"""What each method trains: parameters, exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from veneer.adapter.choose import choose
from veneer.errors import ConfigError
from veneer.plan.amounts import Amount, Term, amount
from veneer.plan.config import ADAPTING, PlanConfig
from veneer.plan.shapes import ModelShape, Part


@dataclass(frozen=True)
class Adapted:
    """A layer under a low-rank adapter: A (rank, in) and B (out, rank).

    dropout: whether inputs of the adapter are dropped out, whose mask is kept too. half: whether
    one factor alone trains, and the one that is random at the start does not (LoRA-FA). started:
    whether A₀ and B₀ are kept, and what acts has twice the rank.
    """

    part: Part
    rank: int
    dropout: bool = False
    half: bool = False
    started: bool = False

    @property
    def trained(self) -> tuple[int, str]:
        """Parameters that train for each of its ranks, and what they are."""
        out, in_ = self.part.shape
        if not self.half:
            return in_ + out, "in + out"
        return (out, "out") if self.part.is_linear else (in_, "words")

    @property
    def beside(self) -> int:
        """Numbers that lie beside the model, but do not train."""
        each = sum(self.part.shape)
        return self.rank * (each - self.trained[0] + each * self.started)

    @property
    def acting_rank(self) -> int:
        return self.rank * (1 + self.started)


@dataclass(frozen=True)
class Trained:
    """What trains of a model, or beside it.

    weights: the model's own layers that train. adapted: layers under adapters. first_block: the
    lowest block that a gradient must reach, `depth` for none; nothing below it is kept. prefix:
    whether keys and values of virtual tokens, which attention sees before a text's own. beside:
    numbers that lie beside the model without training.
    """

    parameters: Amount
    weights: tuple[Part, ...] = ()
    adapted: tuple[Adapted, ...] = ()
    first_block: int = 0
    prefix: bool = False
    beside: int = 0

    @property
    def count(self) -> int:
        return self.parameters.value

    @property
    def ranks(self) -> int:
        """Sum of the ranks of all adapters."""
        return sum(each.acting_rank for each in self.adapted)


class Adapters(Protocol):
    """Which layers adapters lie on, and with which ranks: what adapter/config.py's LoRA says."""

    @property
    def targets(self) -> str | Sequence[str]: ...
    @property
    def layers(self) -> str | None: ...
    @property
    def dropout(self) -> float: ...
    @property
    def lora_fa(self) -> bool: ...
    @property
    def has_start(self) -> bool: ...
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
    return tuple(
        Adapted(
            part,
            adapters.rank_of(part.path),
            dropout=adapters.dropout > 0,
            half=adapters.lora_fa,
            started=adapters.has_start and part.is_linear,
        )
        for part in found
    )


def trained_by(config: PlanConfig, shape: ModelShape, adapted: tuple[Adapted, ...] = ()) -> Trained:
    """Return what `config.method` trains; `adapted` are the layers under adapters, if any.

    full: all parameters. freeze: the last `trained_blocks` blocks, and norms and head where asked
    for. lora: rank · (in + out) a layer (Hu et al. 2021, section 4.1). dora: the same and `out`
    magnitudes (Liu et al. 2024, section 4.1). prefix: keys and values of virtual tokens in each
    layer, or the MLP that makes them (Li and Liang 2021, section 4.3). prompt: virtual tokens'
    embeddings (Lester et al. 2021).

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
        return _freezing(config, shape)
    term = Term.of(shape.parameters, "parameters")
    return Trained(amount("all", term), shape.parts)


def _freezing(config: PlanConfig, shape: ModelShape) -> Trained:
    if config.trained_blocks > shape.depth:
        raise ConfigError(
            f"trained_blocks is {config.trained_blocks}, but there are {shape.depth} blocks."
        )
    first = shape.depth - config.trained_blocks
    blocks = [part for part in shape.parts if part.block is not None and part.block >= first]
    norms = [part for part in shape.parts if part.kind == "norm" and part not in blocks]
    head = [part for part in shape.parts if part.is_head]
    tied = bool(head) and head[0].tied
    if tied:  # then what trains is the embedding of words
        head += shape.parts[:1]
    each = sum(part.parameters for part in shape.in_block(first))
    terms = [Term.of(config.trained_blocks, "blocks", each, "parameters")]
    others = [*norms * config.train_norms, *head * config.train_head]
    if others:
        rest = sum(part.parameters for part in others)
        terms.append(Term.of(rest, "parameters", note="norms and head"))
    # Below the blocks, a gradient must reach the lowest norm, or the embedding.
    lowest = 0 if config.train_norms or (config.train_head and tied) else first
    return Trained(amount("blocks", *terms), (*blocks, *others), first_block=lowest)


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
    alike = Counter((each.part.name, each.rank, each.trained) for each in adapted)
    terms = []
    for (name, rank, numbers), count in alike.items():
        terms.append(Term.of(count, "layers", rank, "rank", *numbers, note=name))
    if magnitudes:
        total = sum(each.part.out for each in adapted)
        terms.append(Term.of(total, "magnitudes", note="one for each output"))
    # An adapter outside of the blocks lies before them all, but for the head.
    first = min(
        shape.depth if each.part.is_head else 0 if each.part.block is None else each.part.block
        for each in adapted
    )
    beside = sum(each.beside for each in adapted)
    return Trained(amount("adapters", *terms), adapted=adapted, first_block=first, beside=beside)
