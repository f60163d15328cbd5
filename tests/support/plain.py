"""What an adapted model should compute, by the papers' formulas: a plain base whose weights are
made of the adapters' by ordinary differentiable operations, in float32 or in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

import veneer
from support.kinds import Kind
from veneer.adapter.active import active_adapters_of
from veneer.adapter.layers import lora_layers
from veneer.adapter.new_tokens import new_tokens_of
from veneer.data.encode import UNLABELLED, Example


class Float64(TorchFunctionMode):
    """Lets a model that computes some things in float32 whatever its dtype stay in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is Tensor.to and torch.float32 in args[1:]:
                return args[0]
            if kwargs.get("dtype") == torch.float32:
                kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


class Plain:
    """The model that `adapted` should be, with leaves of its own for all that trains there."""

    def __init__(self, kind: Kind, adapted: Any, dtype: torch.dtype) -> None:
        self.kind, self.dtype = kind, dtype
        configs = veneer.adapters(adapted)
        acting = [getattr(configs[name], "invocation", None) for name in veneer.in_use(adapted)]
        self.invocation = next(filter(None, acting), ())
        if kind.is_virtual:  # no change of a weight: the model's own forward is the plain one
            self.model = copy.deepcopy(adapted).to(dtype)
            self.leaves = {n: w for n, w in self.model.named_parameters() if w.requires_grad}
            self.weights: dict[str, Tensor] = {}
            return
        base = kind.base()
        self.model = (veneer.merge(base) if kind.bits else base).to(dtype).requires_grad_(False)
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")  # the only one that knows float64
        self.leaves = {
            name: weight.detach().to(dtype).requires_grad_(True)
            for name, weight in adapted.named_parameters()
            if weight.requires_grad
        }
        self._live = {id(w): self.leaves.get(name) for name, w in adapted.named_parameters()}
        own = self.model.named_parameters(remove_duplicate=False)
        frozen = {name: (id(weight), weight) for name, weight in own}
        trained = {i: self.leaves[name] for name, (i, _) in frozen.items() if name in self.leaves}
        self.weights = {name: trained.get(i, weight) for name, (i, weight) in frozen.items()}
        self.base_weights = dict(self.weights)
        self._replace(adapted)
        self._change(adapted)
        self._lengthen(adapted)

    def live(self, tensor: Tensor) -> Tensor:
        """Return the leaf of a tensor that trains in the adapted model, or the tensor."""
        leaf = self._live.get(id(tensor))
        return tensor.detach().to(self.dtype) if leaf is None else leaf

    def _replace(self, adapted: Any) -> None:
        """Put in what one adapter alone has in the place of the base's weights."""
        for saved in active_adapters_of(adapted).modules_to_save.values():
            self.weights |= {path: self.live(weight) for path, weight in saved.items()}

    def _change(self, adapted: Any) -> None:
        """Add Σ w ΔW: s B A, s (B A - B₀ A₀), or DoRA's m (W + s B A) / ‖W + s B A‖ - W."""
        for path, layer in lora_layers(adapted):
            name = path if path in self.weights else f"{path}.weight"
            owner = self.model.get_submodule(name.rpartition(".")[0])
            before = self.weights[name]
            flipped = isinstance(owner, Conv1D | nn.Embedding) or (
                before.ndim == 3 and getattr(owner, "is_transposed", False)
            )
            W = before.transpose(-1, -2) if flipped else before
            W = W.flatten(1) if isinstance(owner, nn.Conv2d) else W  # (..., out, in)
            total = W
            for adapter, weight in layer.active():
                A, B = self.live(adapter.lora_A), self.live(adapter.lora_B)
                change = B @ A
                if adapter.start is not None:
                    A0, B0 = (tensor.to(self.dtype) for tensor in adapter.start)
                    change = change - B0 @ A0
                change = adapter.scaling * change
                if adapter.magnitude is not None:
                    V = W + change
                    gain = self.live(adapter.magnitude) / V.norm(dim=1).detach()
                    change = gain[:, None] * V - W
                total = total + weight * change
                if adapter.lora_bias is not None:
                    bias = weight * adapter.scaling * self.live(adapter.lora_bias)
                    own = self.weights.get(f"{path}.bias")
                    self.weights[f"{path}.bias"] = bias if own is None else own + bias
            changed = (total.transpose(-1, -2) if flipped else total).view_as(before)
            for tokens, weight in layer.active_tokens():
                rows = before[tokens.ids] + weight * (self.live(tokens.rows) - before[tokens.ids])
                changed = changed.index_copy(0, tokens.ids, rows)
            self.weights[name] = changed

    def _lengthen(self, adapted: Any) -> None:
        """Put the rows of new tokens behind those of the base."""
        if (new := new_tokens_of(adapted)) is None:
            return
        for module, rows in (
            (self.model.get_input_embeddings(), new.embedding.rows),
            (self.model.get_output_embeddings(), new.head.rows),
        ):
            path = next(path for path, each in self.model.named_modules() if each is module)
            weight = self.weights[f"{path}.weight"]
            self.weights[f"{path}.weight"] = torch.cat([weight, self.live(rows)])

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        if self.invocation:
            return torch.cat([self._from_invocation(row) for row in inputs["input_ids"]])
        inputs = {k: x.to(self.dtype) if x.is_floating_point() else x for k, x in inputs.items()}
        options = {"use_cache": False} if self.kind.reads_tokens else {}
        with Float64() if self.dtype == torch.float64 else nullcontext():
            if not self.weights:
                return self.model(**inputs, **options).logits
            call = functional_call(
                self.model, self.weights, (), inputs | options, tie_weights=False
            )
            return call.logits

    def _from_invocation(self, row: Tensor) -> Tensor:
        """Return a row's logits, (1, tokens, vocab): of the changed weights from the invocation on,
        over the keys and values that the base's own have of what comes before."""
        tokens, invocation = row.tolist(), [*self.invocation]
        places = range(len(tokens) - len(invocation) + 1)
        starts = [i for i in places if tokens[i : i + len(invocation)] == invocation]
        start = starts[-1] if starts else len(tokens)
        cache, logits = DynamicCache(), []
        with Float64() if self.dtype == torch.float64 else nullcontext():
            for weights, tokens_of in (
                (self.base_weights, row[:start]),
                (self.weights, row[start:]),
            ):
                if len(tokens_of):
                    inputs = {"input_ids": tokens_of[None], "cache": cache, "use_cache": True}
                    call = functional_call(self.model, weights, (), inputs, tie_weights=False)
                    logits.append(call.logits)
        return torch.cat(logits, 1)

    def loss(self, rows: list[Example]) -> Tensor:
        """Return the sum of the label tokens' losses, row by row."""
        return _loss(lambda tokens: self.logits({"input_ids": tokens}), rows)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(loss, list(self.leaves.values()), allow_unused=True)
        return {n: g for n, g in zip(self.leaves, grads, strict=True) if g is not None}


def plain_pair(kind: Kind, adapted: Any) -> tuple[Plain, Plain]:
    """Return the plain model in float32, our peer, and in float64, the reference."""
    return Plain(kind, adapted, torch.float32), Plain(kind, adapted, torch.float64)


def own_loss(model: Any, rows: list[Example]) -> Tensor:
    """Return the sum of the label tokens' losses as a model itself gives them, row by row."""
    with Float64() if model.dtype == torch.float64 else nullcontext():
        return _loss(lambda tokens: model(input_ids=tokens, use_cache=False).logits, rows)


def _loss(logits: Callable[[Tensor], Tensor], rows: list[Example]) -> Tensor:
    losses = []
    for row in rows:
        labels = torch.tensor(row.labels[1:])
        out = logits(torch.tensor([row.tokens]))[0, :-1]
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        losses.append(F.cross_entropy(out, labels, ignore_index=UNLABELLED, reduction="sum"))
    return torch.stack(losses).sum()


@torch.no_grad()
def exact_logits(model: Any, tokens: Tensor) -> Tensor:
    """Return what a model says when all that it has is computed with in float64."""
    with Float64():
        return copy.deepcopy(model).double()(tokens, use_cache=False).logits
