"""What virtual tokens consist of, and how they start: as the tokens of a text.

A prefix (Li and Liang 2021) is their keys and values in each layer, a prompt (Lester et al. 2021)
their embeddings.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.method import Method
from veneer.adapter.use import base_alone
from veneer.adapter.virtual_context import context_left
from veneer.errors import ConfigError
from veneer.models.blocks import decoder_of
from veneer.models.evaluating import evaluating
from veneer.quant.weight import kept_weight

# Virtual tokens start as tokens drawn from the vocabulary's first, which in a tokenizer's order of
# merges are the most common (Lester et al. 2021, section 3.2, draw from 5,000 too).
COMMON_TOKENS = 5000


class Prefix(nn.Module):
    """Keys and values of virtual tokens as a cache has them, after the rotary embedding:
    (layers, 2, kv_heads, virtual, head_dim), a float32 master."""

    def __init__(self, keys_values: Tensor) -> None:
        super().__init__()
        self.keys_values = nn.Parameter(keys_values.to(torch.float32))

    def forward(self) -> Tensor:
        return self.keys_values


class PrefixMLP(nn.Module):
    """Keys and values that an MLP makes: W₂ tanh(W₁ e + b₁) + b₂ for each virtual token e.

    Li and Liang 2021, section 4.3: training it is steadier than training what it makes. Only what
    it makes is saved. shape: (layers, 2, kv_heads, virtual, head_dim); an embedding is as wide as
    the keys of a layer.
    """

    def __init__(
        self, shape: tuple[int, ...], width: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.shape = shape
        layers, two, heads, count, head_dim = shape
        dim, out = heads * head_dim, layers * two * heads * head_dim
        self.embeddings = nn.Parameter(torch.randn(count, dim, generator=generator))
        self.W1 = nn.Parameter(_uniform(width, dim, fan_in=dim, generator=generator))
        self.b1 = nn.Parameter(_uniform(width, fan_in=dim, generator=generator))
        self.W2 = nn.Parameter(_uniform(out, width, fan_in=width, generator=generator))
        self.b2 = nn.Parameter(_uniform(out, fan_in=width, generator=generator))

    def forward(self) -> Tensor:
        inner = torch.tanh(F.linear(self.embeddings, self.W1, self.b1))  # (virtual, width)
        flat = F.linear(inner, self.W2, self.b2)  # (virtual, layers · 2 · kv_heads · head_dim)
        layers, two, heads, _, dim = self.shape
        return flat.unflatten(1, (layers, two, heads, dim)).permute(1, 2, 3, 0, 4)


class Prompt(nn.Module):
    """Embeddings of virtual tokens, (virtual, dim), a float32 master."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(embeddings.to(torch.float32))

    def forward(self) -> Tensor:
        return self.embeddings


def new_virtual_tokens(
    model: PreTrainedModel,
    config: Method,
    *,
    seed: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Prefix | PrefixMLP | Prompt:
    """Return the virtual tokens that `config` trains, as they start.

    They start as the tokens of `prompt_text`, repeated or cut to their number, or as common tokens
    drawn at random; an MLP starts at random. Raises ConfigError where there is no tokenizer for the
    text, no room in the model's context, no cache of keys and values, or, for a prefix, none of one
    shape.
    """
    count = _checked_count(model, config)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    embedding: Any = model.get_input_embeddings()
    common = min(COMMON_TOKENS, kept_weight(embedding).shape[0])
    ids = torch.randint(common, (count,), generator=generator)
    if config.prompt_text is not None:
        ids = _tokens(config.prompt_text, count, tokenizer)
    with torch.no_grad(), base_alone(model):
        if config.method == "prompt":
            return Prompt(embedding(ids.to(model.device)))
        if config.prefix_mlp is None:
            return Prefix(keys_values(model, ids))
        layers, two, heads, _, dim = keys_values(model, ids[:1]).shape
        shape = (layers, two, heads, count, dim)
        return PrefixMLP(shape, config.prefix_mlp, generator)


def stored_virtual_tokens(config: Method, tensors: dict[str, Tensor]) -> Prefix | Prompt:
    """Return virtual tokens with stored values, whose shape is that of `virtual_shape`."""
    value = tensors[config.method]
    return Prefix(value) if config.method == "prefix" else Prompt(value)


def virtual_shape(model: PreTrainedModel, config: Method) -> tuple[int, ...]:
    """Return the shape of the one tensor that `config` has over `model`.

    Raises ConfigError as `new_virtual_tokens` does.
    """
    count = _checked_count(model, config)
    if config.method == "prompt":
        embedding: Any = model.get_input_embeddings()
        return (count, kept_weight(embedding).shape[1])
    layers, two, heads, _, dim = keys_values(model, torch.zeros(1, dtype=torch.long)).shape
    return (layers, two, heads, count, dim)


def keys_values(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the keys and values that the base caches for tokens (tokens,):
    (layers, 2, kv_heads, tokens, head_dim). No config gives their shape for every architecture.

    Raises ConfigError where some layers have none, of another shape, or not one for each token.
    """
    decoder = decoder_of(model)
    cache = DynamicCache()  # without a config, it keeps more than an attention window too
    _check_cache(decoder)
    with torch.no_grad(), base_alone(model), evaluating(decoder):
        try:
            decoder(input_ids=ids[None].to(model.device), use_cache=True, cache=cache)
        except (MemoryError, torch.OutOfMemoryError):
            raise  # says nothing of the model's code
        except Exception as error:  # of foreign code, which may need a cache of its own kind
            raise ConfigError(
                "prefix needs a model that takes a cache of keys and values alone, and this one's "
                f"code raises {type(error).__name__}: {error}"
            ) from error
    layers: list[Any] = cache.layers
    cached: list[Any] = [getattr(layer, x, None) for layer in layers for x in ("keys", "values")]
    shapes = {None if x is None else tuple(x.shape) for x in cached}
    if len(shapes) != 1 or not all(shape and shape[2] == len(ids) for shape in shapes):
        raise ConfigError(
            "prefix needs a model that keeps keys and values of one shape in all layers."
        )
    return torch.cat(cached).unflatten(0, (-1, 2))


def _check_cache(decoder: nn.Module) -> None:
    """Raise ConfigError where a layer of a decoder has no cache of keys and values."""
    config: Any = decoder.config
    layers = DynamicCache(config=config).layers
    has_cache = "cache" in inspect.signature(decoder.forward).parameters
    # Layers that keep a state beside keys and values (Falcon-H1's) need a cache of their own.
    plain = all(hasattr(layer, "keys") and not hasattr(layer, "conv_states") for layer in layers)
    if not has_cache or not plain:
        raise ConfigError(
            "Virtual tokens need a model with keys and values in every layer, and no other state."
        )


def _checked_count(model: PreTrainedModel, config: Method) -> int:
    _check_cache(decoder_of(model))
    assert config.virtual_tokens is not None
    context_left(model.config, config.virtual_tokens)
    return config.virtual_tokens


def _tokens(text: str, count: int, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    if tokenizer is None:
        raise ConfigError("prompt_text needs the model's tokenizer; pass tokenizer to attach.")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"prompt_text is {text!r}, which has no tokens.")
    return torch.tensor((ids * math.ceil(count / len(ids)))[:count])


def _uniform(*shape: int, fan_in: int, generator: torch.Generator | None) -> Tensor:
    """Return what torch's own linear layers start with: uniform in ± 1 / √fan_in."""
    bound = fan_in**-0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
