"""What happens within the decoder layers of a model during one pass: which submodule reads what.

A layer's structure is found from that, by no names: two submodules are connected where one reads
the very memory that the other has written. It works on meta tensors too, which have no numbers.
Layers are in training mode meanwhile, lest their dropout be missed; its masks are known ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from veneer.adapter.wrapper import Wrapper
from veneer.fused.rotaries import Angles
from veneer.kernels.attention import NAME, Packing, packed_attention
from veneer.kernels.dropout import Mask
from veneer.models.blocks import decoder_of
from veneer.quant.weight import QuantizedLinear

WATCHED = f"{NAME}_watched"  # in transformers' AttentionInterface
# What changes only numbers that are large: few tokens may show nothing of it.
CLIPPING = (torch.clamp, torch.clamp_, torch.clip, torch.clip_)
CLIPPING_METHODS = (Tensor.clamp, Tensor.clamp_, Tensor.clip, Tensor.clip_)
EXPERTS = ("expert", "router", "moe")  # of which a mixture's submodules are named
Options = dict[str, Any]  # keyword arguments of a layer, or of its attention


@dataclass(frozen=True)
class Call:
    """A submodule that counts as one (`_leaves`) has read `x` and written `y`."""

    path: str
    module: nn.Module
    x: Tensor
    y: Tensor

    def reads(self, y: Tensor) -> bool:
        """Return whether what it has read is `y`, or a view of it."""
        return same_memory(self.x, y)


@dataclass(frozen=True)
class Attended:
    """Attention has read q (1, heads, tokens, head_dim), k and v, with these options."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: Options


@dataclass(frozen=True)
class Dropped:
    """Dropout has read `x`."""

    x: Tensor
    p: float


@dataclass
class LayerPass:
    """One pass through one decoder layer: its input (1, tokens, dim) and options, what its
    submodules did in their order, and its output."""

    layer: nn.Module
    x: Tensor
    options: Options
    y: Tensor
    returns_tuple: bool
    returns_more: bool  # than hidden states
    before: Sequence[Call] = ()  # attention
    attended: Attended | None = None
    after: Sequence[Call] = ()
    dropped: Sequence[Dropped] = ()
    clips: bool = False  # some submodule's output


Watcher = Callable[[LayerPass], None]


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are views of the same memory."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def watch(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    inputs: Mapping[str, Any],
    packing: Packing,
    watcher: Watcher,
) -> None:
    """Take one row through the decoder, and call `watcher` with each pass through a layer.

    It is called during the pass, while the layer's weights are read: a base may be larger than the
    memory. packing: of that one row. Raises whatever the model raises. What the layers drop out,
    they drop by `known_mask`; adapters drop nothing.
    """
    noted = _Noted()

    def note(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, None]:
        noted.attend(args, options)
        q, _, v = args[:3]
        if q.is_meta:
            return q.new_empty(1, q.shape[2], q.shape[1], v.shape[3]), None
        options |= {"packing": options.get("packing") or packing, "attention_mask": None}
        if p := options.get("dropout"):
            options["dropout"] = known_mask(p)
        return packed_attention(module, *args[:3], **options)

    decoder: Any = decoder_of(model)
    ALL_ATTENTION_FUNCTIONS.register(WATCHED, note)
    asks = attention_is_asked_for(model)
    try:
        with (
            torch.random.fork_rng(devices=[]),  # what is random in training mode
            _hooked(layers, noted, watcher),
            attention(model, decoder, WATCHED) if asks else nullcontext(),
            _NotedFunctions(noted, attention=not asks),
        ):
            decoder(**inputs, use_cache=False)
    finally:
        ALL_ATTENTION_FUNCTIONS.register(WATCHED, packed_attention)  # which holds no model


def attention_is_asked_for(model: PreTrainedModel) -> bool:
    """Return whether the model's code gets its attention by name, and so can get ours."""
    code = sys.modules[type(decoder_of(model)).__module__]
    return hasattr(code, "ALL_ATTENTION_FUNCTIONS")


def angles_of(args: tuple, options: Options) -> Angles | None:
    """Return cos and sin from a layer's arguments, None where there are none."""
    arguments = (options.get("position_embeddings"), *args)
    return next((x for x in arguments if _are_angles(x)), None)


def _are_angles(x: Any) -> bool:
    return len(x) == 2 if isinstance(x, tuple) else isinstance(x, Tensor) and x.is_complex()


@contextmanager
def attention(model: PreTrainedModel, decoder: Any, name: str) -> Iterator[None]:
    """Let the decoder of `model` attend by the implementation that transformers knows as `name`.

    Other parts, such as a vision tower, keep their own.
    """
    configs = [model.config, decoder.config]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = {"": name}
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = {"": own}


def is_mixture(path: str, module: nn.Module) -> bool:
    """Return whether a submodule of a layer is a mixture of experts, or a part of one."""
    paths = [path, *(inner for inner, _ in module.named_modules())]
    return any(mark in inner.lower() for inner in paths for mark in EXPERTS)


def known_mask(p: float) -> Mask:
    """Return the mask by which watched layers drop something out with probability p."""
    return Mask(p, seed=0)


@dataclass
class _Noted:
    """What has been noted since the last layer began."""

    calls: list[Call] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    attended: Attended | None = None
    before: int = 0  # calls when attention began

    def attend(self, args: tuple, options: Options) -> None:
        q, k, v = args[:3]
        self.attended, self.before = Attended(q, k, v, dict(options)), len(self.calls)


class _NotedFunctions(TorchFunctionMode):
    """Notes dropout and clipping, and with `attention` torch's own attention, for a model's code
    that calls it itself."""

    def __init__(self, noted: _Noted, *, attention: bool) -> None:
        super().__init__()
        self.noted, self.attention = noted, attention

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and self.attention:
            self.noted.attend(args, {"scaling": kwargs.get("scale")})
        if function in CLIPPING or function in CLIPPING_METHODS:
            self.noted.clipped.append(args[0])
        if function is F.dropout:
            return self._dropped(*args, **kwargs)
        return function(*args, **kwargs)

    def _dropped(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or not p:
            return x
        self.noted.dropped.append(Dropped(x, p))
        mask = known_mask(p)
        return mask.apply(x.reshape(-1, x.shape[-1])).view(x.shape) * mask.scale


@contextmanager
def _hooked(layers: Sequence[nn.Module], noted: _Noted, watcher: Watcher) -> Iterator[None]:
    """Note the calls of all submodules, and call `watcher` after each layer."""

    modes: list[tuple[nn.Module, bool]] = []  # before the layer began

    def clear() -> None:
        noted.calls, noted.dropped, noted.clipped = [], [], []
        noted.attended, noted.before = None, 0
        while modes:
            module, training = modes.pop()
            module.training = training

    def begin(layer: nn.Module, *_: Any) -> None:
        clear()
        for module in _own_modules(layer):
            modes.append((module, module.training))
            module.training = True

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, options: Options, y: Any) -> None:
            x = next((x for x in (*args, *options.values()) if isinstance(x, Tensor)), None)
            y = y[0] if isinstance(y, tuple) else y  # a router's logits may be beside it
            if x is not None and isinstance(y, Tensor):
                noted.calls.append(Call(path, module, x, y))

        return hook

    def end(layer: nn.Module, args: tuple, options: Options, output: Any) -> None:
        returns_tuple = isinstance(output, tuple)
        y = output[0] if returns_tuple else output
        x = args[0] if args else options.get("hidden_states")
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return
        calls, before = noted.calls, noted.before
        options = {**options, "position_embeddings": angles_of(args, options)}
        watcher(
            LayerPass(
                *(layer, x, options, y, returns_tuple),
                returns_more=returns_tuple and any(more is not None for more in output[1:]),
                before=calls[:before],
                attended=noted.attended,
                after=calls[before:],
                dropped=noted.dropped,
                clips=any(same_memory(x, call.y) for x in noted.clipped for call in calls),
            )
        )
        clear()  # or tensors would be kept for long

    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(begin))
            handles.append(layer.register_forward_hook(end, with_kwargs=True))
            for path, module in _leaves(layer):
                handles.append(module.register_forward_hook(note(path), with_kwargs=True))
        yield
    finally:
        clear()
        for handle in handles:
            handle.remove()


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and those in it, but for ours."""
    if not isinstance(module, Wrapper):
        yield module
        for child in module.children():
            yield from _own_modules(child)


def _leaves(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield what counts as one module: without submodules, of ours, or a mixture of experts."""
    children = dict(module.named_children())
    is_ours = isinstance(module, Wrapper | QuantizedLinear)
    if path and (not children or is_ours or is_mixture(path, module)):
        yield path, module
        return
    for name, child in children.items():
        yield from _leaves(child, f"{path}.{name}" if path else name)
