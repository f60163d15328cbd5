"""Activated LoRA (Greenewald et al., arXiv 2504.12397): an adapter that acts from an invocation on.

In each row it acts on the tokens from the last occurrence of the invocation's tokens on, and not at
all in a row without them. All earlier tokens have the base's own keys and values, so whoever has
these need not compute them again. A hook before the decoder finds the place for each pass: plain
calls, generation and packed training all pass there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.active import ActiveAdapters, active_adapters_of
from veneer.adapter.config import LoRA
from veneer.errors import AdapterError, ConfigError, joined, listed
from veneer.models.blocks import decoder_of
from veneer.models.description import Layer
from veneer.quant.weight import kept_weight

STATE = "veneer_invoked"  # of a KV cache: on which of its rows each adapter acts already


def tokenized(config: LoRA, tokenizer: PreTrainedTokenizerBase | None) -> LoRA:
    """Return the config with the ids of its invocation's tokens in place of a text.

    Raises ConfigError for a text without a tokenizer, or of no tokens.
    """
    if tokenizer is None or not isinstance(config.invocation, str):
        config.invocation_tokens  # noqa: B018 (raises for a text)
        return config
    ids = tokenizer(config.invocation, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"The invocation {config.invocation!r} has no tokens.")
    return replace(config, invocation=tuple(ids))


def invocation_start(tokens: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Return where the last occurrence of an invocation begins in a row, None where it has none."""
    for start in range(len(tokens) - len(invocation), -1, -1):
        end = start + len(invocation)
        if tokens[start] == invocation[0] and [*tokens[start:end]] == [*invocation]:
            return start
    return None


def check_invocation(model: nn.Module, config: LoRA, targets: Sequence[Layer]) -> None:
    """Raise ConfigError where an adapter over `targets` cannot act from its invocation on."""
    if problems := invocation_problems(model, config, targets):
        raise ConfigError(f"This adapter cannot be: {joined(problems)}.")


def invocation_problems(model: nn.Module, config: LoRA, targets: Sequence[Layer]) -> list[str]:
    """Return what keeps an adapter over `targets` from acting from its invocation on."""
    if config.invocation is None:
        return []
    embedding: Any = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    if not hasattr(embedding, "weight"):
        return ["an invocation is for models that read tokens"]
    problems = []
    vocab = kept_weight(embedding).shape[0]
    tokens = () if isinstance(config.invocation, str) else config.invocation_tokens
    if beyond := [token for token in tokens if token >= vocab]:
        problems.append(
            f"the invocation has the tokens {listed(map(str, beyond))}, and the model {vocab:,}"
        )
    others = [x.path for x in targets if not x.is_linear or x.block is None or x.is_head]
    if others:
        problems.append(
            "an adapter with an invocation acts on linear layers of the decoder's blocks alone, "
            f"and the targets have {listed(others)} too"
        )
    return problems


class _Pass:
    """A pass whose backward pass has not begun; its graph alone keeps it."""


class Invocations:
    """Finds, before each pass of a decoder, on which tokens adapters with an invocation act.

    Some models give their decoder embeddings and masks of their own: then the model's own input
    counts.
    """

    def __init__(self, model: PreTrainedModel, active_adapters: ActiveAdapters) -> None:
        self.active_adapters = active_adapters
        self.invocations: dict[str, tuple[int, ...]] = {}  # by adapter
        self._state: dict[str, Tensor] = {}  # of the pass that is running
        self._of_model: dict[str, Any] = {}  # what the model is called with, while it runs
        self._not_backward: WeakSet[_Pass] = WeakSet()
        decoder = decoder_of(model)
        self._hooks = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after),
        ]
        if decoder is not model:
            self._hooks += [
                model.register_forward_pre_hook(self._note, with_kwargs=True),
                model.register_forward_hook(self._forget, always_call=True),
            ]

    def remove_hooks(self) -> None:
        """Leave the decoder as it was."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._of_model = _arguments(model, args, kwargs) if self.invocations else {}

    def _forget(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._of_model = {}

    def _before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._state = {}
        segments = self.active_adapters.segments
        learning = () if segments is None else (name for name, *_ in segments.of_adapters)
        acting = {*self.active_adapters.weights, *learning}
        active = {name: own for name, own in self.invocations.items() if name in acting}
        if not active:
            return
        if self._not_backward and any(map(_is_checkpointed, decoder.modules())):
            raise AdapterError(
                "Gradient checkpointing computes layers again, and it is known of one pass alone "
                f"on which tokens {listed(active)} acts; call backward before the next pass, or "
                "turn gradient checkpointing off."
            )
        arguments = _arguments(decoder, args, kwargs)
        tokens: Tensor | None = arguments.get("input_ids")
        mask = arguments.get("attention_mask")
        if tokens is None:
            tokens, mask = map(self._of_model.get, ("input_ids", "attention_mask"))
        if tokens is None:
            raise AdapterError(
                f"{listed(active)} acts from an invocation on, which is found among token ids; "
                "give the model input_ids in place of embeddings."
            )
        rows = _rows_of(tokens, arguments.get("position_ids"))
        is_text = None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            is_text = mask[:, -tokens.shape[1] :].bool()
        cache = _cache_in(arguments)
        goes_on = cache is not None and cache.get_seq_length() > 0
        earlier: Mapping[str, Tensor] = getattr(cache, STATE, {}) if goes_on else {}
        for name, invocation in active.items():
            before = earlier.get(name)
            if goes_on and tokens.shape[1] == 1:  # a new token, which invokes nothing
                acts = torch.zeros_like(tokens, dtype=torch.bool)
            else:
                acts = acts_from(tokens, invocation, rows, is_text)
            if before is not None:
                acts = acts | before[:, None]
            self._state[name] = acts[:, -1]
            self.active_adapters.acts_on[name] = acts.reshape(-1, 1)

    def _after(self, decoder: nn.Module, args: tuple, output: Any) -> None:
        """Note in the cache that the pass has filled, and perhaps made, where adapters act; and
        that the backward pass is still to come."""
        if not self._state:
            return
        cache = _cache_in(output) if isinstance(output, Mapping) else None
        if cache is not None:
            setattr(cache, STATE, self._state)
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            this = _Pass()
            self._not_backward.add(this)
            hidden.register_hook(lambda _: self._not_backward.discard(this))


def acts_from(
    tokens: Tensor, invocation: Sequence[int], rows: Tensor, is_text: Tensor | None = None
) -> Tensor:
    """Return where in tokens (lines, tokens) an adapter acts, from the last occurrence of its
    invocation on: (lines, tokens) of bool. Nothing is read from the device.

    rows (lines, tokens): the number of each token's row in its line, in ascending order. is_text
    (lines, tokens): False for padding; None where there is none.
    """
    count = tokens.shape[1]
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    places = count - len(invocation) + 1  # where it has space
    if places <= 0:
        return begins
    begins[:, :places] = True
    for offset, token in enumerate(invocation):
        behind = slice(offset, offset + places)
        fits = (tokens[:, behind] == token) & (rows[:, behind] == rows[:, :places])
        if is_text is not None:
            fits &= is_text[:, behind]
        begins[:, :places] &= fits
    place = torch.arange(count, device=tokens.device)
    beginnings = torch.where(begins, place, -1)
    last = torch.full_like(tokens, -1).scatter_reduce(1, rows, beginnings, "amax")  # of each row
    start = last.gather(1, rows)
    return (start >= 0) & (place >= start)


def attach_invocation(model: nn.Module, name: str, config: LoRA) -> None:
    """Let an adapter of `model` act from its invocation on, if it has one."""
    if not (tokens := config.invocation_tokens):
        return
    assert isinstance(model, PreTrainedModel)
    active_adapters = active_adapters_of(model)
    if active_adapters.invocations is None:
        active_adapters.invocations = Invocations(model, active_adapters)
    active_adapters.invocations.invocations[name] = tokens
    active_adapters.acts_on[name] = None


def detach_invocations(model: nn.Module, names: set[str]) -> None:
    """Forget the invocations of adapters, and with the last of them the hook."""
    active_adapters = active_adapters_of(model)
    for name in names:
        active_adapters.acts_on.pop(name, None)
    if (attached := active_adapters.invocations) is not None:
        for name in names & set(attached.invocations):
            del attached.invocations[name]
        if not attached.invocations:
            attached.remove_hooks()
            active_adapters.invocations = None


def invoked(model: nn.Module) -> list[str]:
    """Return the names of the adapters in use that act from an invocation on."""
    active_adapters = active_adapters_of(model)
    return [name for name in active_adapters.weights if name in active_adapters.acts_on]


def _arguments(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a module is called with, by name."""
    if not args:
        return dict(kwargs)
    names = inspect.signature(module.forward).parameters
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _is_checkpointed(module: nn.Module) -> bool:
    return module.training and bool(getattr(module, "gradient_checkpointing", False))


def _cache_in(arguments: Mapping[str, Any]) -> Any:
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


def _rows_of(tokens: Tensor, positions: Tensor | None) -> Tensor:
    """Return the number of each token's row in its line: rows of a packed batch begin where the
    positions begin again."""
    if positions is None or positions.ndim != 2:
        return torch.zeros_like(tokens)
    starts = (positions == 0).expand(tokens.shape)
    return (starts.cumsum(1) - 1).clamp(min=0)
