"""What tells one base from another of the same shape: its structure, weights and vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from veneer.quant.weight import quantized_layers

SAMPLES = 16  # values read of each weight, evenly spread
# Settings that change what the same weights compute.
SETTINGS = ("model_type", "num_attention_heads", "num_key_value_heads", "rope_parameters")
_VOCABULARIES: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, str]] = WeakKeyDictionary()


class Marks:
    """The fingerprint of a base whose weights are seen one by one, before they are packed."""

    def __init__(self, skeleton: nn.Module, samples: Mapping[str, str] | None = None) -> None:
        self._config = _config_mark(skeleton, base_parameters(skeleton))
        self._names = set(base_parameters(skeleton))
        self.samples = dict(samples or {})

    def see(self, name: str, weight: Tensor) -> None:
        """Take note of a weight."""
        if name in self._names:
            self.samples[name] = _sample(weight)

    def found(self) -> dict[str, str]:
        """Return {"config", "weights"}, as `fingerprint` does of the whole model."""
        samples = [self.samples[name] for name in sorted(self.samples)]
        return {"config": self._config, "weights": _hash(samples)}


def fingerprint(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, str]:
    """Return {"config", "weights", "tokenizer"}, each a short hash of that part of the base.

    The same for the base alone and with adapters on it, in float32 as in bfloat16, and packed:
    weights are sampled as they were before packing, and samples are compared in bfloat16. The
    tokenizer is hashed as it was before words were added to it.
    """
    marks = dict(getattr(model, "veneer_marks", {})) or _marks_of(model)
    if tokenizer is not None:
        marks["tokenizer"] = _vocabulary_mark(tokenizer)
    return marks


def base_parameters(model: nn.Module, *, every_name: bool = False) -> dict[str, Tensor]:
    """Return the base's own parameters under the base's own paths, whatever lies over them.

    A tied weight stands there under its first path, or with `every_name` under each. Packed weights
    are no parameters, and are left out.
    """
    active_adapters = getattr(model, "veneer_active_adapters", None)
    own = (
        {} if active_adapters is None else active_adapters.replaced
    )  # where an adapter's weights stand in their place
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, parameter in model.named_parameters(remove_duplicate=False):
        parts = path.split(".")
        if "adapters" in parts or parts[-1] == "rows":
            continue
        plain = _base_path(path)
        parameter = own.get(plain, parameter)
        if every_name or id(parameter) not in seen:
            found[plain] = parameter
        seen.add(id(parameter))
    return dict(sorted(found.items()))


def parameter_count(model: nn.Module) -> int:
    """Return how many parameters the base has, packed or not."""
    packed = (layer.quantized_weight.shape.numel() for layer in quantized_layers(model).values())
    return sum(weight.numel() for weight in base_parameters(model).values()) + sum(packed)


def _marks_of(model: nn.Module) -> dict[str, str]:
    weights = base_parameters(model)
    for path, layer in quantized_layers(model).items():
        # Packed by others: nothing but the codes is left to tell it by.
        weights[f"{_base_path(path)}.weight"] = layer.quantized_weight.tensors()["weight"]
    weights = dict(sorted(weights.items()))
    return {
        "config": _config_mark(model, weights),
        "weights": _hash(map(_sample, weights.values())),
    }


def _vocabulary_mark(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the hash of the words that a tokenizer came with, which is made once: of 50 thousand
    it takes longer than all else of loading an adapter."""
    size = tokenizer.vocab_size
    known, mark = _VOCABULARIES.get(tokenizer, (None, ""))
    if known != size:
        vocabulary = sorted((i, word) for word, i in tokenizer.get_vocab().items() if i < size)
        mark = _hash(f"{i} {word}" for i, word in vocabulary)
        _VOCABULARIES[tokenizer] = size, mark
    return mark


def _config_mark(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    config = getattr(model, "config", None)
    settings = [f"{key}={getattr(config, key, None)}" for key in SETTINGS]
    return _hash([f"{path}{tuple(weight.shape)}" for path, weight in weights.items()] + settings)


def _base_path(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "original")


def _sample(weight: Tensor) -> str:
    flat = weight.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    values = flat[::step][:SAMPLES].to(torch.bfloat16).view(torch.int16)
    return ",".join(map(str, values.tolist()))


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
