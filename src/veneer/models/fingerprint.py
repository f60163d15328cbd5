"""The parameters of a base, and its fingerprint: short hashes of structure, weights, vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from veneer.models.score import SCORE, SCORE_WEIGHT, Score
from veneer.processes.sharded import whole
from veneer.quant.stack import QuantizedStack, quantized_weights
from veneer.quant.weight import QuantizedWeight

SAMPLES = 16  # values read of each weight, evenly spread
# Settings that change what the same weights compute.
SETTINGS = ("model_type", "num_attention_heads", "num_key_value_heads", "rope_parameters")
Sampled = tuple[torch.Size, str]  # a weight's shape, and values of it
_VOCABULARIES: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, str]] = WeakKeyDictionary()


class Marks:
    """Takes the fingerprint of a base from its weights one by one, before they are quantized."""

    def __init__(self, skeleton: nn.Module) -> None:
        own = base_parameters(skeleton)
        self._names = {name: weight.shape for name, weight in own.items()}
        self._config = _config_mark(skeleton, self._names)
        self.samples: dict[str, str] = {}

    def see(
        self,
        name: str,
        weight: Tensor | QuantizedWeight,
        *,
        expert: int | None = None,
        transposed: bool = False,
    ) -> None:
        """Take samples of a weight, or of one expert of a stack after the other.

        transposed: the model keeps a quantized weight (out, in) as (in, out).
        """
        if name in self._names and expert is None:
            self.samples[name] = _sample(weight, transposed=transposed)
        elif name in self._names:
            size = weight.shape.numel()
            total = size * self._names[name][0]
            more = _values(weight, total, first=(expert or 0) * size, transposed=transposed)
            before = [self.samples[name]] if expert else []
            self.samples[name] = ",".join(filter(None, [*before, _text(more)]))

    def fingerprint(self) -> dict[str, str]:
        """Return {"config", "weights"}, as `fingerprint` does for a whole model."""
        samples = [self.samples[name] for name in sorted(self.samples)]
        return {"config": self._config, "weights": _hash(samples)}


def fingerprint(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, str]:
    """Return {"config", "weights", "tokenizer"}, a short hash of each.

    It is the same for the base alone and with adapters, in float32 and bfloat16, dense and
    quantized: weights are sampled before they are quantized, and samples are taken in bfloat16. The
    tokenizer is hashed without the tokens that were added to it.
    """
    marks = dict(getattr(model, "veneer_marks", {})) or marks_of(model)
    if tokenizer is not None:
        marks["tokenizer"] = _vocabulary_mark(tokenizer)
    return marks


def base_parameters(model: nn.Module, *, every_name: bool = False) -> dict[str, Tensor]:
    """Return the base's own parameters by their paths in the base, also under adapters.

    A tied weight has its first path, or with `every_name` all its paths. Quantized weights are not
    parameters.
    """
    active_adapters = getattr(model, "veneer_active_adapters", None)
    replaced = {} if active_adapters is None else active_adapters.replaced
    parameters: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, parameter in model.named_parameters(remove_duplicate=False):
        names = path.split(".")
        if "adapters" in names or names[-1] == "rows":
            continue
        if path == SCORE_WEIGHT and isinstance(model.get_submodule(SCORE), Score):
            continue
        base_path = _base_path(path)
        parameter = replaced.get(base_path, parameter)
        if every_name or id(parameter) not in seen:
            parameters[base_path] = parameter
        seen.add(id(parameter))
    return dict(sorted(parameters.items()))


def parameter_count(model: nn.Module) -> int:
    """Return how many parameters the base has, quantized or not."""
    quantized = quantized_weights(model).values()
    return sum(weight.numel() for weight in base_parameters(model).values()) + sum(
        weight.shape.numel() for weight in quantized
    )


def marks_of(model: nn.Module, seen: Mapping[str, Sampled] | None = None) -> dict[str, str]:
    """Return {"config", "weights"} of a model; seen: what has been sampled of it already."""
    sampled = {**(seen or {}), **sampled_of(model, without=seen or ())}
    sampled = dict(sorted(sampled.items()))
    return {
        "config": _config_mark(model, {path: shape for path, (shape, _) in sampled.items()}),
        "weights": _hash(text for _, text in sampled.values()),
    }


def sampled_of(
    module: nn.Module, prefix: str = "", *, without: Collection[str] = ()
) -> dict[str, Sampled]:
    """Return the shape and samples of each weight in a module, by their paths behind a prefix."""
    weights = {prefix + path: weight for path, weight in base_parameters(module).items()}
    for path, weight in quantized_weights(module).items():
        # Another program quantized it: only codes are left to sample.
        owner = (prefix + _base_path(path)).removesuffix(".")
        if isinstance(weight, QuantizedStack) and owner not in without:
            weights[owner] = next(iter(weight.expert(0).tensors().values()))
        elif isinstance(weight, QuantizedWeight) and f"{owner}.weight" not in without:
            weights[f"{owner}.weight"] = next(iter(weight.tensors().values()))
    return {
        path: (weight.shape, _sample(weight))
        for path, weight in weights.items()
        if path not in without
    }


def _vocabulary_mark(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hash of a tokenizer's original tokens.

    It is cached: for 50 thousand tokens it takes longer than all else in loading an adapter.
    """
    size = tokenizer.vocab_size
    cached_size, mark = _VOCABULARIES.get(tokenizer, (None, ""))
    if cached_size != size:
        vocabulary = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i < size)
        mark = _hash(f"{i} {token}" for i, token in vocabulary)
        _VOCABULARIES[tokenizer] = size, mark
    return mark


def _config_mark(model: nn.Module, shapes: Mapping[str, torch.Size]) -> str:
    config = getattr(model, "config", None)
    settings = [f"{key}={_setting(config, key)}" for key in SETTINGS]
    return _hash([f"{path}{tuple(shape)}" for path, shape in shapes.items()] + settings)


def _setting(config: Any, key: str) -> Any:
    """Return a setting, or None; of a model whose layers differ in it, those of all layers."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # transformers' refusal to name one for all
        return [getattr(layer, key, None) for layer in config.per_layer_config]


def _base_path(path: str) -> str:
    return ".".join(name for name in path.split(".") if name != "original")


def _sample(weight: Tensor | QuantizedWeight, *, transposed: bool = False) -> str:
    return _text(_values(weight, weight.shape.numel(), transposed=transposed))


def _values(
    weight: Tensor | QuantizedWeight, total: int, first: int = 0, *, transposed: bool = False
) -> Tensor:
    """Return the samples in a weight whose numbers are the `first` and following of `total`."""
    step, size = max(1, total // SAMPLES), weight.shape.numel()
    places = range(0, total, step)[:SAMPLES]
    here = torch.tensor([place - first for place in places if 0 <= place - first < size]).long()
    if isinstance(weight, QuantizedWeight) and len(here):
        out, in_ = weight.shape
        row, column = (here % out, here // out) if transposed else (here // in_, here % in_)
        values = weight.rows(row)[torch.arange(len(here)), column]
    elif isinstance(weight, QuantizedWeight):
        values = torch.empty(0)
    else:
        values = whole(weight.detach()).reshape(-1)[here]
    return values.to(torch.bfloat16).view(torch.int16)


def _text(values: Tensor) -> str:
    return ",".join(map(str, values.tolist()))


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
