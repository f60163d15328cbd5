"""How virtual tokens join a model: by hooks around the forward pass of its decoder.

Plain calls, generation and packed training all pass there. A prefix comes into the cache or the
packing, a prompt before the embeddings; the positions of the text count on behind either.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from veneer.adapter.active import ActiveAdapters, active_adapters_of
from veneer.adapter.virtual import Prefix, PrefixMLP, Prompt
from veneer.adapter.virtual_context import attention_window
from veneer.errors import AdapterError
from veneer.kernels.attention import Packing
from veneer.kernels.transfer import has_queue
from veneer.models.blocks import decoder_of

ATTRIBUTE = "veneer_virtual"  # of a model: its VirtualTokens
Arguments = dict[str, Any]


class VirtualTokens(nn.Module):
    """The prefixes and prompts of a model, by name, of which at most one acts.

    The decoder reads the one that acts before the text, and returns the last hidden states of the
    text alone.
    """

    def __init__(self, decoder: PreTrainedModel, active_adapters: ActiveAdapters) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active_adapters = active_adapters
        self._names = tuple(inspect.signature(decoder.forward).parameters)
        self._text: slice | Tensor | None = None  # where the text's tokens are in the output
        self._hooks = (
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after),
        )

    def active(self) -> Prefix | PrefixMLP | Prompt | None:
        """Return the prefix or prompt that acts, if one does."""
        return next(
            (self.adapters[name] for name in self.active_adapters.weights if name in self.adapters),
            None,  # type: ignore[return-value]
        )

    def remove_hooks(self) -> None:
        """Leave the decoder as it was."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, decoder: Any, args: tuple, kwargs: Arguments) -> tuple[tuple, Arguments]:
        self._text = None
        virtual = self.active()
        if virtual is None:
            return args, kwargs
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        if isinstance(virtual, Prompt):
            self._prepend_embeddings(decoder, arguments, virtual().to(decoder.dtype))
        else:
            _prepend_keys_values(decoder, arguments, virtual().to(decoder.dtype))
        return (), arguments

    def _after(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        if self._text is not None:
            output.last_hidden_state = output.last_hidden_state[:, self._text]

    def _prepend_embeddings(self, decoder: Any, arguments: Arguments, prompt: Tensor) -> None:
        """Prepend embeddings (virtual, dim) to those of each row."""
        count = len(prompt)
        cache = arguments.get("cache")
        if cache is not None and cache.get_seq_length():
            _shift(decoder, arguments, count)  # the prompt is in the cache
            return
        text = arguments.get("inputs_embeds")
        if text is None:
            text = decoder.get_input_embeddings()(arguments["input_ids"])  # (rows, tokens, dim)
        arguments["input_ids"], arguments["inputs_embeds"] = None, text
        virtual_positions = torch.arange(count, device=text.device)
        if arguments.get("packing") is not None:
            lengths = arguments["packing"].lengths
            longer = [count + length for length in lengths]
            arguments["inputs_embeds"] = _prepend(prompt, text[0], lengths)[None]
            positions = arguments["position_ids"][0] + count
            arguments["position_ids"] = _prepend(virtual_positions, positions, lengths)[None]
            arguments["packing"] = Packing(longer, text.device)
            indices = torch.arange(sum(longer), device=text.device)
            self._text = torch.cat([row[count:] for row in indices.split(longer)])
            return
        _shift(decoder, arguments, count)
        if (positions := arguments.get("position_ids")) is not None:
            rows = virtual_positions.expand(len(positions), -1)
            arguments["position_ids"] = torch.cat([rows, positions], dim=1)
        arguments["inputs_embeds"] = torch.cat([prompt.expand(len(text), -1, -1), text], dim=1)
        self._text = slice(count, None)


class _PrefixCache(DynamicCache):
    """Keys and values of a prefix, to which those of the text are not added.

    Nobody will ask for them, and a layer that is recomputed for the backward pass would add them
    twice.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[layer_idx]
        return (
            torch.cat([layer.keys, key_states], dim=2),
            torch.cat([layer.values, value_states], dim=2),
        )


def _prepend_keys_values(decoder: Any, arguments: Arguments, prefix: Tensor) -> None:
    """Prepend keys and values (layers, 2, kv_heads, virtual, head_dim) to those of each row."""
    count = prefix.shape[3]
    if arguments.get("packing") is not None:
        arguments["packing"] = arguments["packing"].behind(prefix.unbind())
        arguments["position_ids"] = arguments["position_ids"] + count
        return
    _shift(decoder, arguments, count)
    cache = arguments.get("cache")
    if cache is None:
        use_cache = arguments.get("use_cache")
        use_cache = decoder.config.use_cache if use_cache is None else use_cache
        cache = (DynamicCache if use_cache else _PrefixCache)(config=decoder.config)
        arguments["cache"] = cache
    if not cache.get_seq_length():
        text = arguments.get("input_ids")
        rows = len(arguments["inputs_embeds"] if text is None else text)
        for layer, pair in enumerate(prefix):
            DynamicCache.update(cache, *(x.expand(rows, -1, -1, -1) for x in pair), layer)


def _shift(decoder: Any, arguments: Arguments, count: int) -> None:
    """Move the mask and the positions of the text on by `count` virtual tokens."""
    if (mask := arguments.get("attention_mask")) is not None:
        if mask.ndim != 2:
            raise AdapterError("Virtual tokens need an attention mask of rows and tokens alone.")
        length, window = count + mask.shape[1], attention_window(decoder)
        # A window counts padding too, which would push virtual tokens out of it.
        if window and length > window and not bool(mask[:, 0].all()):
            raise AdapterError(
                f"Rows that are padded on the left to {length} tokens would see less of their "
                f"virtual tokens than alone, for attention reaches back {window}; take one at a "
                "time."
            )
        arguments["attention_mask"] = F.pad(mask, (count, 0), value=1)
        if arguments.get("position_ids") is None and _needs_positions(decoder, mask):
            # Counted with padding, a row would be farther from its virtual tokens than alone.
            text = arguments.get("inputs_embeds")
            tokens = (arguments["input_ids"] if text is None else text).shape[1]
            arguments["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]
    if (positions := arguments.get("position_ids")) is not None:
        arguments["position_ids"] = positions + count


def _needs_positions(decoder: Any, mask: Tensor) -> bool:
    """Return whether a mask has padding. A device with a queue is not asked: counted by the mask,
    positions are right either way, and so are given to whatever takes them."""
    if has_queue(mask.device):
        return "position_ids" in inspect.signature(decoder.forward).parameters
    return not bool(mask.all())


def _prepend(first: Tensor, packed: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return packed rows (tokens, ...) with `first` before each of them."""
    return torch.cat([x for row in packed.split(list(lengths)) for x in (first, row)])


def attach_virtual_tokens(model: PreTrainedModel, name: str, virtual: nn.Module) -> None:
    """Attach a prefix or a prompt to `model` under a name."""
    if (attached := virtual_tokens_of(model)) is None:
        attached = VirtualTokens(decoder_of(model), active_adapters_of(model))
        model.add_module(ATTRIBUTE, attached)
    attached.adapters[name] = virtual.to(model.device)


def detach_virtual_tokens(model: nn.Module, names: set[str]) -> None:
    """Detach prefixes and prompts from `model`, and with the last of them the hooks."""
    if (attached := virtual_tokens_of(model)) is not None:
        for name in names & set(attached.adapters):
            del attached.adapters[name]
        if not attached.adapters:
            attached.remove_hooks()
            delattr(model, ATTRIBUTE)


def virtual_tokens_of(model: nn.Module) -> VirtualTokens | None:
    """Return the prefixes and prompts of `model`, or None where it has none."""
    return getattr(model, ATTRIBUTE, None)


def idle_virtual_tokens(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the prefixes and prompts that are attached but do not act."""
    if (attached := virtual_tokens_of(model)) is not None:
        for name, virtual in attached.adapters.items():
            if name not in attached.active_adapters.weights:
                yield virtual


def virtual_input_count(model: nn.Module) -> int:
    """Return how many virtual tokens go through the layers before each text: a prompt's."""
    attached = virtual_tokens_of(model)
    virtual = attached.active() if attached is not None else None
    return len(virtual.embeddings) if isinstance(virtual, Prompt) else 0
