"""Virtual tokens in front of every text: their keys and values (prefix) or embeddings (prompt).

They come in by hooks on the decoder, the one place that plain calls, generation and packed training
share. The text's own positions move on by as many as there are virtual tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.active import ActiveAdapters, active_adapters_of
from veneer.adapter.method import Method
from veneer.errors import AdapterError, ConfigError
from veneer.kernels.attention import Packing

HOME = "veneer_virtual"  # where a model has them
# Words are drawn from the vocabulary's first, which in a tokenizer's order of merges are the most
# common (Lester et al. 2021, section 3.2, draw from 5,000 too).
COMMON_WORDS = 5000
Arguments = dict[str, Any]


class Prefix(nn.Module):
    """Keys and values of virtual tokens as they lie in a cache, behind the rotary embedding:
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


class VirtualTokens(nn.Module):
    """The prefixes and prompts of a model, by name. The one that acts comes in front
    of what the decoder reads; the last hidden state that it gives is that of the text alone."""

    def __init__(self, decoder: PreTrainedModel, active_adapters: ActiveAdapters) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active_adapters = active_adapters
        self._names = tuple(inspect.signature(decoder.forward).parameters)
        self._own: slice | Tensor | None = None  # where the text's tokens are in the output
        self._hooks = (
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after),
        )

    def acting(self) -> Prefix | PrefixMLP | Prompt | None:
        """Return the prefix or prompt that acts, if one does."""
        return next(
            (self.adapters[name] for name in self.active_adapters.weights if name in self.adapters),
            None,  # type: ignore[return-value]
        )

    def remove(self) -> None:
        """Take the hooks off the decoder."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, decoder: Any, args: tuple, kwargs: Arguments) -> tuple[tuple, Arguments]:
        self._own = None
        part = self.acting()
        if part is None:
            return args, kwargs
        given = dict(zip(self._names, args, strict=False)) | kwargs
        if isinstance(part, Prompt):
            self._embed(decoder, given, part().to(decoder.dtype))
        else:
            self._put_before(decoder, given, part().to(decoder.dtype))
        return (), given

    def _after(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        if self._own is not None:
            output.last_hidden_state = output.last_hidden_state[:, self._own]

    def _put_before(self, decoder: Any, given: Arguments, prefix: Tensor) -> None:
        """Let attention see keys and values (layers, 2, kv_heads, virtual, head_dim) first."""
        count = prefix.shape[3]
        if given.get("packing") is not None:
            given["packing"] = given["packing"].behind(prefix.unbind())
            given["position_ids"] = given["position_ids"] + count
            return
        _move_on(decoder, given, count)
        cache = given.get("cache")
        if cache is None:
            kept = given.get("use_cache")
            kept = decoder.config.use_cache if kept is None else kept
            cache = (DynamicCache if kept else _Standing)(config=decoder.config)
            given["cache"] = cache
        if not cache.get_seq_length():
            text = given.get("input_ids")
            rows = len(given["inputs_embeds"] if text is None else text)
            for layer, pair in enumerate(prefix):
                DynamicCache.update(cache, *(x.expand(rows, -1, -1, -1) for x in pair), layer)

    def _embed(self, decoder: Any, given: Arguments, prompt: Tensor) -> None:
        """Put embeddings (virtual, dim) in front of those of the text."""
        count = len(prompt)
        cache = given.get("cache")
        if cache is not None and cache.get_seq_length():
            _move_on(decoder, given, count)  # the prompt is in the cache
            return
        text = given.get("inputs_embeds")
        if text is None:
            text = decoder.get_input_embeddings()(given["input_ids"])  # (rows, tokens, dim)
        given["input_ids"], given["inputs_embeds"] = None, text
        first = torch.arange(count, device=text.device)
        if given.get("packing") is not None:
            lengths = given["packing"].lengths
            places = torch.arange(text.shape[1], device=text.device)
            own = _in_front(first - count, places, lengths) >= 0
            given["inputs_embeds"] = _in_front(prompt, text[0], lengths)[None]
            positions = given["position_ids"][0] + count
            given["position_ids"] = _in_front(first, positions, lengths)[None]
            given["packing"] = Packing([count + length for length in lengths], text.device)
            self._own = own.nonzero().squeeze(1)
            return
        _move_on(decoder, given, count)
        if (positions := given.get("position_ids")) is not None:
            rows = first.expand(len(positions), -1)
            given["position_ids"] = torch.cat([rows, positions], dim=1)
        given["inputs_embeds"] = torch.cat([prompt.expand(len(text), -1, -1), text], dim=1)
        self._own = slice(count, None)


class _Standing(DynamicCache):
    """Keys and values that stand before a text, whose own are not kept: nobody will ask for them,
    and a layer that is computed again for the backward pass would add them twice."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[layer_idx]
        return (
            torch.cat([layer.keys, key_states], dim=2),
            torch.cat([layer.values, value_states], dim=2),
        )


def _move_on(decoder: Any, given: Arguments, count: int) -> None:
    """Make the mask and the positions of a text those that it has behind `count` tokens."""
    if (mask := given.get("attention_mask")) is not None:
        if mask.ndim != 2:
            raise AdapterError("Virtual tokens need an attention mask of rows and tokens alone.")
        places, window = count + mask.shape[1], _window(decoder)
        # A window counts places, and padding would take those of virtual tokens.
        if window and places > window and not bool(mask[:, 0].all()):
            raise AdapterError(
                f"Rows that are padded on the left to {places} places would see less of their "
                f"virtual tokens than alone, for attention reaches back {window}; take one at a "
                "time."
            )
        given["attention_mask"] = F.pad(mask, (count, 0), value=1)
        if given.get("position_ids") is None and not bool(mask.all()):
            # By place, padded rows would stand farther from their virtual tokens than alone.
            text = given.get("inputs_embeds")
            tokens = (given["input_ids"] if text is None else text).shape[1]
            given["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]
    if (positions := given.get("position_ids")) is not None:
        given["position_ids"] = positions + count


def _in_front(front: Tensor, packed: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return packed rows, which lie end to end, with `front` in front of each."""
    return torch.cat([part for row in packed.split(list(lengths)) for part in (front, row)])


def fresh(
    model: PreTrainedModel,
    config: Method,
    *,
    seed: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Prefix | PrefixMLP | Prompt:
    """Return what `config` trains of virtual tokens, as it starts: as if words stood there.

    Those of `prompt_text`, repeated or cut to their number, or common words drawn at random. An MLP
    starts at random. Raises ConfigError where there is no tokenizer for the text, no room in the
    model's context, no cache of keys and values, or, for a prefix, none of one shape.
    """
    count = _checked_count(model, config)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    embedding: Any = model.get_input_embeddings()
    words = min(COMMON_WORDS, len(embedding.weight))
    ids = torch.randint(words, (count,), generator=generator)
    if config.prompt_text is not None:
        ids = _tokens(config.prompt_text, count, tokenizer)
    with torch.no_grad():
        if config.method == "prompt":
            return Prompt(embedding(ids.to(model.device)))
        if config.prefix_mlp is None:
            return Prefix(keys_values(model, ids))
        layers, two, heads, _, dim = keys_values(model, ids[:1]).shape
        shape = (layers, two, heads, count, dim)
        return PrefixMLP(shape, config.prefix_mlp, generator)


def stored(config: Method, tensors: dict[str, Tensor]) -> Prefix | Prompt:
    """Return virtual tokens with stored values, which `shape_of` has proved right."""
    value = tensors[config.method]
    return Prefix(value) if config.method == "prefix" else Prompt(value)


def shape_of(model: PreTrainedModel, config: Method) -> tuple[int, ...]:
    """Return the shape of the one tensor that `config` has over `model`. Raises ConfigError as
    `fresh` does."""
    count = _checked_count(model, config)
    if config.method == "prompt":
        embedding: Any = model.get_input_embeddings()
        return (count, embedding.weight.shape[1])
    layers, two, heads, _, dim = keys_values(model, torch.zeros(1, dtype=torch.long)).shape
    return (layers, two, heads, count, dim)


def keys_values(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the keys and values that the base keeps of a text (tokens,):
    (layers, 2, kv_heads, tokens, head_dim). It alone knows the shape they have.

    Raises ConfigError where its layers do not all keep such, of one shape.
    """
    active_adapters, decoder = active_adapters_of(model), model.get_decoder()
    cache = DynamicCache()  # without a config it keeps all, whatever a window would let go
    _check_cache(decoder)
    acting, active_adapters.weights = active_adapters.weights, {}
    try:
        with torch.no_grad():
            decoder(input_ids=ids[None].to(model.device), use_cache=True, cache=cache)
    finally:
        active_adapters.weights = acting
    layers: list[Any] = cache.layers
    kept: list[Any] = [getattr(layer, x, None) for layer in layers for x in ("keys", "values")]
    shapes = {None if x is None else tuple(x.shape) for x in kept}
    if len(shapes) != 1 or None in shapes:
        raise ConfigError(
            "prefix needs a model that keeps keys and values of one shape in all layers."
        )
    return torch.cat(kept).unflatten(0, (-1, 2))


def put_virtual(model: PreTrainedModel, name: str, part: nn.Module) -> None:
    """Lay virtual tokens over `model` under a name."""
    if (home := virtual_tokens(model)) is None:
        home = VirtualTokens(model.get_decoder(), active_adapters_of(model))
        model.add_module(HOME, home)
    home.adapters[name] = part.to(model.device)


def take_virtual(model: nn.Module, names: set[str]) -> None:
    """Take virtual tokens off `model`, and with the last of them all that was laid over it."""
    if (home := virtual_tokens(model)) is not None:
        for name in names & set(home.adapters):
            del home.adapters[name]
        if not home.adapters:
            home.remove()
            delattr(model, HOME)


def virtual_tokens(model: nn.Module) -> VirtualTokens | None:
    """Return what holds the model's virtual tokens, or None where it has none."""
    return getattr(model, HOME, None)


def idle_virtual(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the virtual tokens that are attached but do not act."""
    if (home := virtual_tokens(model)) is not None:
        yield from (
            part for name, part in home.adapters.items() if name not in home.active_adapters.weights
        )


def tokens_in_front(model: nn.Module) -> int:
    """Return how many virtual tokens go through the layers in front of each text."""
    home = virtual_tokens(model)
    part = home.acting() if home is not None else None
    return len(part.embeddings) if isinstance(part, Prompt) else 0


def virtual_count(model: nn.Module) -> int:
    """Return how many virtual tokens act, and so how many places of the context they take."""
    active_adapters = active_adapters_of(model)
    acting = [active_adapters.configs[name] for name in active_adapters.weights]
    return sum(each.virtual_tokens or 0 for each in acting if isinstance(each, Method))


def takes_padding(model: nn.Module, longest: int) -> bool:
    """Return whether texts may be padded on the left to `longest` tokens to stand in one batch."""
    count, window = virtual_count(model), _window(model)
    return not (count and window and count + longest > window)


def context_left(model: nn.Module, count: int) -> int | None:
    """Return how many tokens the model's context has beside `count` virtual ones, None where it has
    no end. Raises ConfigError where they leave no room."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return None
    if context - count < 2:
        raise ConfigError(
            f"{count} virtual tokens leave no room in the model's context of {context:,}."
        )
    return int(context - count)


def _window(model: Any) -> int | None:
    return getattr(model.config, "sliding_window", None)


def _check_cache(decoder: nn.Module) -> None:
    """Raise ConfigError where a layer of a decoder has no cache of keys and values."""
    config: Any = decoder.config
    layers = DynamicCache(config=config).layers
    named = "cache" in inspect.signature(decoder.forward).parameters
    if not named or not all(hasattr(layer, "keys") for layer in layers):
        raise ConfigError("Virtual tokens need a model with keys and values in every layer.")


def _checked_count(model: PreTrainedModel, config: Method) -> int:
    _check_cache(model.get_decoder())
    assert config.virtual_tokens is not None
    context_left(model, config.virtual_tokens)
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
