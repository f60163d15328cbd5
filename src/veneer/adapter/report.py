"""Counts for people: what would train, before anything does, and what of a base is quantized."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from veneer.adapter.config import LoRA
from veneer.adapter.invocation import check_invocation
from veneer.adapter.method import Method, description
from veneer.adapter.targets import check_parameters, resolve, uncovered, with_expert_ranks
from veneer.models.description import Layer
from veneer.models.fingerprint import base_parameters, parameter_count
from veneer.quant.stack import QuantizedStack, quantized_weights


@dataclass(frozen=True)
class TargetLine:
    """A layer W (out × in) under an adapter, and how large the adapter is."""

    layer: Layer
    rank: int
    config: LoRA

    @property
    def path(self) -> str:
        return self.layer.path

    @property
    def out(self) -> int:
        return self.layer.out

    @property
    def in_(self) -> int:
        return self.layer.in_

    @cached_property
    def factors(self) -> tuple[int, int]:
        """Numbers of A and of B."""
        A, B = self.layer.factor_shapes(self.rank, shared_a=self.config.shared_expert_a)
        return math.prod(A), math.prod(B)

    @cached_property
    def trained_factors(self) -> int:
        """Numbers of A and B that train: with LoRA-FA, not the factor that starts at random."""
        A, B = self.factors
        if not self.config.lora_fa:
            return A + B
        return A if self.layer.kind == "embedding" else B

    @property
    def trained(self) -> int:
        """Parameters over the layer that train: factors, and DoRA's magnitudes."""
        return self.trained_factors + self.out * self.config.dora

    @property
    def largest_rank(self) -> int:
        """The highest rank that a change of the layer (of one expert, in a stack) can have."""
        if self.layer.parameter is not None:
            return min(self.layer.oriented[-2:])
        return min(self.out, self.in_)

    @property
    def has_start(self) -> bool:
        """Whether the factors that it starts from are kept beside those that train."""
        return self.config.has_start and self.layer.is_linear

    @property
    def share(self) -> float:
        """Trained parameters as a share of the frozen weight's own."""
        return self.trained / (self.out * self.in_)


@dataclass(frozen=True, slots=True)
class TargetReport:
    """What trains in words, its parameters and those of the base; the adapted layers, if any; what
    `all` or `mlp` cannot reach, in words."""

    what: str
    trained: int
    base_parameters: int
    lines: Sequence[TargetLine] = ()
    uncovered: str | None = None

    @property
    def share(self) -> float:
        return self.trained / self.base_parameters

    @property
    def remarks(self) -> list[str]:
        """What is legal but hardly meant."""
        return remarks(self.share, self.lines)


def remarks(share: float, lines: Sequence[TargetLine]) -> list[str]:
    """Return a sentence for each thing that is legal but hardly meant: more parameters that train
    (share: of the base's) than the base has, and ranks that no change of a layer can have."""
    texts = []
    if share > 1:
        texts.append(
            f"More parameters train than the base has ({share:.0%}): a lower --rank, or --method "
            "full, learns as much with fewer."
        )
    if above := [line for line in lines if line.rank > line.largest_rank]:
        first = above[0]
        texts.append(
            f"The rank is larger than a dimension of {len(above)} layers (rank {first.rank} over "
            f"{first.path}): B A has at most rank {first.largest_rank} there, so a higher --rank "
            "only costs memory."
        )
    return texts


def target_lines(model: nn.Module, config: LoRA) -> tuple[TargetLine, ...]:
    """Return the layers that `config` adapts in `model`, which may be on the meta device.

    Raises TargetError for targets that match nothing, ConfigError for a method that cannot be over
    one of them.
    """
    layers = resolve(model, config)
    check_parameters(config, layers)
    check_invocation(model, config, layers)
    config = with_expert_ranks(config, layers)
    return tuple(TargetLine(layer, config.rank_of(layer.path), config) for layer in layers)


def report_targets(model: nn.Module, config: LoRA) -> TargetReport:
    """Return what `config` would train over `model`, which may be on the meta device.

    Raises TargetError for targets that match nothing.
    """
    lines = target_lines(model, config)
    trained = sum(line.trained for line in lines)
    whole = parameter_count(model)
    return TargetReport(_adapted(lines), trained, whole, lines, uncovered(model, config))


def _adapted(lines: Sequence[TargetLine]) -> str:
    """Return how many layers are adapted, and how many stacks of experts at which ranks."""
    stacks = Counter((line.layer.experts, line.rank) for line in lines if line.layer.is_stack)
    layers = len(lines) - stacks.total()
    texts = [
        f"{count} stacks of {experts} experts, rank {rank} each"
        for (experts, rank), count in stacks.items()
    ]
    return ", and ".join([f"{layers} layers adapted", *texts])


def report_trained(model: nn.Module, config: LoRA | Method) -> TargetReport:
    """Return what `config`, which is attached, trains of `model` or beside it."""
    if isinstance(config, LoRA):
        return report_targets(model, config)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return TargetReport(description(config), trained, parameter_count(model))


@dataclass(frozen=True, slots=True)
class QuantizedReport:
    """What of a base is quantized, and in how many bytes; the rest, and its bytes."""

    kind: str
    layers: int
    stacks: int  # of experts
    parameters: int
    bytes: int
    other_parameters: int
    other_bytes: int

    @property
    def bits(self) -> float:
        """Bits a quantized parameter, scales included."""
        return 8 * self.bytes / self.parameters

    @property
    def whole_bytes(self) -> int:
        return self.bytes + self.other_bytes


def report_quantized(model: nn.Module) -> QuantizedReport | None:
    """Return what of a model's base is quantized, or None where nothing is."""
    quantized = quantized_weights(model).values()
    if not quantized:
        return None
    others = base_parameters(model).values()
    stacks = sum(isinstance(weight, QuantizedStack) for weight in quantized)
    return QuantizedReport(
        " and ".join(sorted({weight.label for weight in quantized})),
        len(quantized) - stacks,
        stacks,
        sum(weight.shape.numel() for weight in quantized),
        sum(weight.nbytes for weight in quantized),
        sum(weight.numel() for weight in others),
        sum(weight.nbytes for weight in others),
    )
