"""The certificate of a merged model: how far it is from the model that it was merged from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.merge import LayerRounding, layer_roundings, relative_error
from veneer.adapter.use import base_alone, in_use
from veneer.adapter.virtual_context import context_left
from veneer.data.probe import probe_rows
from veneer.errors import MergeError, share_text
from veneer.kernels.wide import wide
from veneer.models.evaluating import evaluating
from veneer.quant.embedding import QuantizedEmbedding
from veneer.quant.stack import quantized_modules, quantized_stacks
from veneer.quant.weight import QuantizedLinear, quantized_layers

# The largest tolerated ‖error‖ / ‖ΔW‖, and the largest divergence as a share of the adapter's
# effect. Rounding to 16 bits takes most of an ordinary change (four fifths after ten steps over
# SmolLM2), but only 4 % of its effect, because the error is spread over all directions and the
# change is not. So the weights decide only where almost nothing of the change is left.
LARGEST_LOST_CHANGE, LARGEST_LOST_EFFECT = 0.9, 0.25
# Nats a token that nobody would notice (half a per cent of perplexity), and by which SmolLM2 in
# bf16 differs from itself when sums are made in another order.
UNNOTICED_DIVERGENCE = 5e-3
ROWS_AT_ONCE = 32  # of logits, which in float64 take 33 MB with a vocabulary of 128 thousand


@dataclass(frozen=True)
class MergeReport:
    """How a merged model differs from the adapted one that it was merged from.

    dtype: of the merged weights. layers: those that the adapters change. tokens: of the probe.
    logit_difference: the largest |merged − adapted| of any logit of any token. divergence:
    KL(adapted ‖ merged) and effect: KL(adapted ‖ base), means over the probe's tokens, in nats.
    divergence_requantized: KL(adapted ‖ merged and quantized again), where the base is quantized.
    """

    dtype: str
    layers: tuple[LayerRounding, ...]
    tokens: int
    logit_difference: float
    divergence: float
    effect: float
    divergence_requantized: float | None = None

    @property
    def lost(self) -> float:
        """What rounding took of the change of all weights: ‖error‖ / ‖ΔW‖."""
        return relative_error((layer.error for layer in self.layers), self.layers)

    @property
    def lost_in_float32(self) -> float:
        """What rounding would take in float32."""
        return relative_error((layer.error_in_float32 for layer in self.layers), self.layers)

    @property
    def lost_requantized(self) -> float | None:
        """What quantizing again would take, in the layers that the base has quantized, if any."""
        layers = [layer for layer in self.layers if layer.error_requantized is not None]
        errors = (layer.error_requantized or 0.0 for layer in layers)
        return relative_error(errors, layers) if layers else None

    # The names of earlier versions.
    lost_packed_again = lost_requantized

    @property
    def divergence_packed_again(self) -> float | None:
        return self.divergence_requantized

    @property
    def worst(self) -> LayerRounding | None:
        """The layer that loses most of its change."""
        return max(self.layers, key=lambda layer: layer.lost, default=None)

    def problems(self) -> list[str]:
        """Return what is lost beyond what is tolerated, with the figures."""
        problems = []
        if not self.lost <= LARGEST_LOST_CHANGE:  # not ">", which a NaN would pass
            problems.append(
                f"rounding to {self.dtype} takes {self.lost:.1%} of the adapter's change of the "
                f"weights, and {LARGEST_LOST_CHANGE:.0%} are tolerated"
            )
        if not self.divergence <= max(UNNOTICED_DIVERGENCE, LARGEST_LOST_EFFECT * self.effect):
            problems.append(
                f"its output is {self.divergence:.2g} nats a token from the adapted model's, where "
                f"the adapter makes {self.effect:.2g}; {LARGEST_LOST_EFFECT:.0%} of these, or "
                f"{UNNOTICED_DIVERGENCE}, are tolerated"
            )
        return problems

    def check(self) -> None:
        """Raise MergeError, with the figures and what helps, where too much is lost."""
        problems = self.problems()
        if not problems:
            return
        lost = self.lost_in_float32
        little = (
            f" It makes only {self.effect:.2g} nats a token: if its run hardly learnt, train more."
            if self.effect < UNNOTICED_DIVERGENCE
            else ""
        )
        better = (
            f"merge in float32 (--dtype float32), which would take {share_text(lost)} of it, or "
        )
        raise MergeError(
            f"The merged model would not be what was learnt: {'; '.join(problems)}. What helps: "
            f"{better if lost < self.lost / 2 else ''}keep the adapter beside the base.{little}"
        )


def certify(
    model: PreTrainedModel,
    plain: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    probe: str | Path | None = None,
) -> MergeReport:
    """Return how `plain`, which merge() made of `model`, differs from it, in weights and in logits.

    The logits are of a small sample that ships, or of the first rows of the file `probe`. Both
    models stay as they are. Raises DataError for a `probe` that cannot be read.
    """
    rows = probe_rows(tokenizer, probe, context=context_left(model.config, 0))
    difference = divergence = effect = divergence_requantized = 0.0
    tokens = sum(map(len, rows))
    requantized = _requantized(model, plain)
    with torch.no_grad(), evaluating(model), evaluating(plain):
        for row in rows:
            adapted, merged = _logits(model, row), _logits(plain, row)
            difference = max(difference, _largest(adapted, merged))
            divergence += _divergence(adapted, merged) / tokens
            if requantized is not None:
                logits = _logits(requantized, row)
                divergence_requantized += _divergence(adapted, logits) / tokens
            if in_use(model):
                with base_alone(model):
                    effect += _divergence(adapted, _logits(model, row), finite=True) / tokens
    return MergeReport(
        str(plain.dtype).removeprefix("torch."),
        tuple(layer_roundings(model, plain)),
        tokens,
        difference,
        divergence,
        effect,
        None if requantized is None else divergence_requantized,
    )


def _requantized(model: PreTrainedModel, plain: PreTrainedModel) -> PreTrainedModel | None:
    """Return the merged model with the layers that the base has quantized quantized again, or None
    where there are none, or one is in a format that Veneer reads but does not quantize to."""
    layers, stacks = quantized_layers(model), quantized_stacks(model)
    if not layers and not stacks:
        return None
    shared = [*plain.parameters(), *plain.buffers()]
    result = copy.deepcopy(plain, {id(tensor): tensor for tensor in shared}).eval()
    for path, layer in layers.items():
        base_path = path.removesuffix(".original")
        dense: Any = result.get_submodule(base_path)
        weight = dense.weight.T if layer.transposed else dense.weight
        quantized = layer.quantized_weight.requantized(weight.contiguous(), plain.dtype)
        if quantized is None:
            return None
        new = QuantizedLinear(quantized, dense, transposed=layer.transposed)
        result.set_submodule(base_path, new)
    for path, stack in stacks.items():
        path, _, name = path.replace(".original.", ".").rpartition(".")
        owner = result.get_submodule(path)
        again = stack.requantized(owner._parameters.pop(name), plain.dtype)
        if again is None:
            return None
        owner.add_module(name, again)
    for path, module in quantized_modules(model).items():
        if isinstance(module, QuantizedEmbedding):  # which nothing adapts
            result.set_submodule(path, module)
    return result


def _logits(model: PreTrainedModel, row: Sequence[int]) -> Tensor:
    """Return the logits (tokens, vocab) of one row."""
    ids = torch.tensor([list(row)], device=model.device)
    logits: Tensor = model(ids, use_cache=False).logits[0]
    return logits


def _largest(adapted: Tensor, merged: Tensor) -> float:
    """Return the largest difference of any finite logit, infinite where one has become NaN."""
    finite = torch.isfinite(adapted)  # a token that cannot be has -∞
    differences = (merged.float() - adapted.float())[finite].abs()
    return float(differences.max().nan_to_num(torch.inf))


def _divergence(p: Tensor, q: Tensor, *, finite: bool = False) -> float:
    """Return Σ KL(p ‖ q) over tokens, in nats, of logits (tokens, vocab).

    Infinite where q has a NaN. With `finite`, only over entries of the vocabulary for which q is
    finite: the base gives new tokens -∞.
    """
    total = 0.0
    for a, b in zip(p.split(ROWS_AT_ONCE), q.split(ROWS_AT_ONCE), strict=True):
        if finite:
            a = a.masked_fill(~torch.isfinite(b), -torch.inf)
        a, b = (wide(x).log_softmax(-1) for x in (a, b))
        terms = torch.where(torch.isneginf(a), 0.0, a.exp() * (a - b))
        total += float(terms.sum().nan_to_num(torch.inf))
    return total
