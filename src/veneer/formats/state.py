"""An adapter as a value, which every format is read into and written from."""

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

CAUSAL = "CAUSAL_LM"

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
    """Tokens that the base does not know, with their rows of the embedding and, where it is not
    tied, of the head."""

    tokens: tuple[str, ...]
    start: int  # the id of the first
    embedding: Tensor  # (new, dim)
    head: Tensor | None = None  # (new, dim)
    # Paths of embedding and head, where the base has unused rows at these ids.
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredTokens:
    """Trained rows for tokens that the base has. They replace the base's rows.

    rows: (tokens, dim), or None where embedding and head share one weight and the other of the two
    has the rows.
    """

    ids: tuple[int, ...]
    rows: Tensor | None


@dataclass(frozen=True)
class StoredLayer:
    """What an adapter has over one layer or parameter; adapter/adapter.py has the formula.

    A (rank, in) and B (out, rank). Of a convolution, which counts as linear, A is (rank, in,
    height, width); of an embedding A is (rank, vocab) and B (dim, rank); of a stack of experts A is
    (experts, rank, in) and B (experts, out, rank). magnitude and bias: (out,). start: A and B as
    they were before training, where B A was not zero.
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


def layer_kind(*, is_embedding: bool) -> FactorKind:
    """Return the kind of a layer in formats that know linear layers and embeddings only."""
    return "embedding" if is_embedding else "linear"


@dataclass(frozen=True)
class AdapterState:
    """An adapter as a value, independent of any model and any file.

    `tensors` are keyed by the base's own paths, with the names in FACTORS, MAGNITUDE, BIAS and
    START behind them; StoredLayer gives the shapes. Of the methods freeze and full they are the
    weights themselves. Of prefix and prompt there is one tensor, under the method's name:
    (layers, 2, kv_heads, virtual, head_dim) and (virtual, dim).
    """

    config: LoRA | Method
    tensors: dict[str, Tensor]
    new_tokens: NewTokenRows | None = None
    base_name: str = ""
    base_fingerprint: Mapping[str, str] = field(default_factory=dict)
    # Base weights that came along in the file; they must equal the base's own.
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)
    # Modules to save and trained biases: what replaces a weight of the base, by that weight's path.
    modules_to_save: Mapping[str, Tensor] = field(default_factory=dict)
    # By the path of embedding or head.
    trained_tokens: Mapping[str, StoredTokens] = field(default_factory=dict)
    task: str = CAUSAL  # as PEFT names it
    training: Mapping[str, Any] = field(default_factory=dict)  # data and recipe, where known

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


def shortest_names(paths: set[str], modules: Iterable[str]) -> tuple[str, ...]:
    """Return the last names of `paths`, or the whole paths where another of the model's `modules`
    has such a last name too.

    Readers of other formats adapt every module, of whatever kind, that bears a target's name.
    """
    names = {path.rpartition(".")[2] for path in paths}
    same_name = {path for path in modules if path.rpartition(".")[2] in names}
    return tuple(sorted(names if same_name == paths else paths))


def lora_settings(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    targets: Sequence[str],
    dropout: float = 0.0,
) -> LoRA:
    """Return the settings of layers that have these ranks and alphas, by path; the most frequent
    ones become the common ones, and the others patterns."""
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
