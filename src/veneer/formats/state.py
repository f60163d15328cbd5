"""An adapter as a value: every format is read into it and written from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from veneer.adapter.config import LoRA
from veneer.adapter.method import Method
from veneer.lowrank.formula import Factors
from veneer.models.description import FactorKind
from veneer.models.locate import HUB_NAMES

CAUSAL = "CAUSAL_LM"
RANKS = "SEQ_CLS"  # of a reward model: PEFT's name for classifiers

# What the tensors of a layer are called, behind its path.
FACTORS: dict[FactorKind, tuple[str, str]] = {
    "linear": ("lora_A", "lora_B"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
    "parameter": ("lora_parameter_A", "lora_parameter_B"),
}
MAGNITUDE, BIAS, START = "magnitude", "lora_bias", ("start_A", "start_B")
LAYER_KEYS = frozenset({*(name for pair in FACTORS.values() for name in pair), *START})
LAYER_KEYS |= {MAGNITUDE, BIAS}


@dataclass(frozen=True)
class NewTokenRows:
    """Tokens that are new to the base, with their rows of the embedding and of an untied head."""

    tokens: tuple[str, ...]
    start: int  # the id of the first
    embedding: Tensor  # (new, dim)
    head: Tensor | None = None  # (new, dim)
    # Paths of embedding and head, if the base has unused rows at these ids.
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredTokens:
    """Trained rows for tokens that the base has. They replace the base's rows.

    rows: (tokens, dim), or None if embedding and head are tied and the other one has the rows.
    """

    ids: tuple[int, ...]
    rows: Tensor | None


@dataclass(frozen=True)
class StoredLayer:
    """An adapter's tensors for one layer or parameter; adapter/adapter.py has the formula.

    A (rank, in), B (out, rank); of an embedding (rank, vocab) and (dim, rank); of a stack of
    experts (experts, rank, in), or (rank, in) for all, and (experts, out, rank). A of a
    convolution, which counts as linear, is (rank, in, height, width). magnitude and bias: (out,).
    start: A and B before training, if B A was not zero then.
    """

    path: str
    A: Tensor
    B: Tensor
    kind: FactorKind = "linear"
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    start: Factors | None = None

    @property
    def is_embedding(self) -> bool:
        return self.kind == "embedding"

    def tensors(self) -> dict[str, Tensor]:
        """Return the layer's tensors by their keys in `AdapterState.tensors`."""
        names = (*FACTORS[self.kind], MAGNITUDE, BIAS, *START)
        values = (self.A, self.B, self.magnitude, self.bias, *(self.start or (None, None)))
        return {
            f"{self.path}.{name}": tensor
            for name, tensor in zip(names, values, strict=True)
            if tensor is not None
        }


def int_if_whole(alpha: float) -> int | float:
    """Return an alpha as an int if it is one, which readers such as vLLM and llama.cpp expect."""
    return int(alpha) if float(alpha).is_integer() else alpha


def layer_kind(*, is_embedding: bool) -> FactorKind:
    """Return the kind of a layer in formats that know linear layers and embeddings only."""
    return "embedding" if is_embedding else "linear"


@dataclass(frozen=True)
class AdapterState:
    """An adapter as a value, independent of any model and any file.

    Keys of `tensors` are a layer's path in the base and a name in FACTORS, MAGNITUDE, BIAS or
    START; StoredLayer gives the shapes. freeze and full have the weights themselves. prefix and
    prompt have one tensor, named after the method: (layers, 2, kv_heads, virtual, head_dim) and
    (virtual, dim).
    """

    config: LoRA | Method
    tensors: dict[str, Tensor]
    new_tokens: NewTokenRows | None = None
    base_name: str = ""
    base_fingerprint: Mapping[str, str] = field(default_factory=dict)
    # Weights of the base that the file has too; they must equal the base's own.
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)
    # Modules to save and trained biases: what replaces a weight of the base, by that weight's path.
    modules_to_save: Mapping[str, Tensor] = field(default_factory=dict)
    # By the path of embedding or head.
    trained_tokens: Mapping[str, StoredTokens] = field(default_factory=dict)
    task: str = CAUSAL  # as PEFT names it
    training: Mapping[str, Any] = field(default_factory=dict)  # what it knows of it: training.py

    @property
    def hub_name(self) -> str:
        """The name of the base for other programs: the hub's, where the base is built in."""
        return HUB_NAMES.get(self.base_name, self.base_name)

    def layers(self) -> Iterator[StoredLayer]:
        """Yield each layer that has both factors."""
        tensor = self.tensors.get
        for kind, (a, b) in FACTORS.items():
            for key, A in self.tensors.items():
                path, _, name = key.rpartition(".")
                if name == a and (B := tensor(f"{path}.{b}")) is not None:
                    A0, B0 = (tensor(f"{path}.{name}") for name in START)
                    start = None if A0 is None or B0 is None else (A0, B0)
                    magnitude, bias = (tensor(f"{path}.{name}") for name in (MAGNITUDE, BIAS))
                    yield StoredLayer(path, A, B, kind, magnitude, bias, start)

    def with_layers(self, layers: Iterable[StoredLayer]) -> AdapterState:
        """Return the adapter with these layers instead of its own of the same paths."""
        new = {layer.path: layer.tensors() for layer in layers}
        tensors: dict[str, Tensor] = {}
        for key, tensor in self.tensors.items():
            tensors |= new.get(key.rpartition(".")[0], {key: tensor})
        return replace(self, tensors=tensors)


def shortest_names(paths: set[str], named: Iterable[str]) -> tuple[str, ...]:
    """Return the last names of `paths`, or whole paths if another of the model's modules and
    parameters, whose paths are `named`, shares a last name: readers of other formats adapt all that
    has a target's name, of any kind."""
    names = {path.rpartition(".")[2] for path in paths}
    same_name = {path for path in named if path.rpartition(".")[2] in names}
    return tuple(sorted(names if same_name == paths else paths))


def lora_settings(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    targets: Sequence[str],
    dropout: float = 0.0,
) -> LoRA:
    """Return the settings of layers with these ranks and alphas, by path: the most frequent as the
    common ones, the others as patterns."""
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    return LoRA(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=targets,
        rank_pattern={path: own for path, own in ranks.items() if own != rank},
        alpha_pattern={path: own for path, own in alphas.items() if own != alpha},
    )
