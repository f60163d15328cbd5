"""What merging changed beside what it should: the certificate of a merged model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapter.attach import in_use, use
from veneer.adapter.layers import lora_layers
from veneer.adapter.merge import LayerLoss, layer_losses, share
from veneer.adapter.virtual_context import context_left
from veneer.data.probe import probe_rows
from veneer.errors import MergeError
from veneer.quant.weight import QuantizedLinear, quantized_layers

# What is too much to lose. Rounding to 16 bits takes most of an ordinary change: four fifths, as
# ‖error‖ / ‖ΔW‖, after ten steps over SmolLM2, and yet it takes but 4 % of what the adapter makes
# the model say, for what is lost is spread over all directions and the change is not. So only a
# change that is all but gone is refused for its size, and all others for what the models say.
MOST_ROUNDED, MOST_UNSAID = 0.9, 0.25
# Nats a token within which nobody would notice (half a per cent of perplexity), and in which bf16
# makes SmolLM2 differ from itself when sums are made in another order.
UNNOTICED = 5e-3
ROWS_AT_ONCE = 32  # of logits, which in float64 weigh 33 MB with a vocabulary of 128 thousand


@dataclass(frozen=True)
class MergeReport:
    """How a merged model differs from the one that it was made of.

    dtype: of the merged weights. layers: those that the adapters change. tokens: of the probe.
    logit_difference: the largest |merged − adapted| of any logit of any token; divergence:
    KL(adapted ‖ merged) and effect: KL(adapted ‖ base), means over the probe's tokens, in nats.
    divergence_packed_again: where the base is packed, KL from the merged model packed as it was.
    """

    dtype: str
    layers: tuple[LayerLoss, ...]
    tokens: int
    logit_difference: float
    divergence: float
    effect: float
    divergence_packed_again: float | None = None

    @property
    def lost(self) -> float:
        """The share of the change of all weights that rounding took: ‖error‖ / ‖ΔW‖."""
        return share((layer.rounded for layer in self.layers), self.layers)

    @property
    def lost_in_float32(self) -> float:
        """The share that would be lost in float32."""
        return share((layer.in_float32 for layer in self.layers), self.layers)

    @property
    def lost_packed_again(self) -> float | None:
        """The share that would be lost if the layers of a packed base were packed again, as they
        were; None for a base that is not packed."""
        errors = [layer.packed_again for layer in self.layers if layer.packed_again is not None]
        if not errors:
            return None
        return share(errors, [x for x in self.layers if x.packed_again is not None])

    @property
    def worst(self) -> LayerLoss | None:
        """The layer that loses the largest share of its change."""
        return max(self.layers, key=lambda layer: layer.lost, default=None)

    def problems(self) -> list[str]:
        """Return what is lost beyond what is tolerated, with the figures."""
        found = []
        if not self.lost <= MOST_ROUNDED:  # so said, for what is no number is not tolerated either
            found.append(
                f"rounding to {self.dtype} takes {self.lost:.1%} of the adapter's change of the "
                f"weights, and {MOST_ROUNDED:.0%} are tolerated"
            )
        if not self.divergence <= max(UNNOTICED, MOST_UNSAID * self.effect):
            found.append(
                f"what it says is {self.divergence:.2g} nats a token from what the adapted model "
                f"says, of the {self.effect:.2g} that the adapter makes; {MOST_UNSAID:.0%} of "
                f"these, or {UNNOTICED}, are tolerated"
            )
        return found

    def check(self) -> None:
        """Raise MergeError, with the figures and what would help, where too much is lost."""
        problems = self.problems()
        if not problems:
            return
        kept = self.lost_in_float32
        better = f"merge in float32 (--dtype float32), which would take {kept:.2%} of it, or "
        raise MergeError(
            f"The merged model would not be what was learnt: {'; '.join(problems)}. What helps: "
            f"{better if kept < self.lost / 2 else ''}keep the adapter beside the base."
        )


def certify(
    model: PreTrainedModel,
    plain: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    probe: str | Path | None = None,
) -> MergeReport:
    """Return how `plain`, which merge() made of `model`, differs from it, in weights and in words.

    The words are those of a small sample that ships, or the first rows of the file `probe`. Both
    models are left as they were. Raises DataError for a `probe` that cannot be read.
    """
    rows = probe_rows(tokenizer, probe, context=context_left(model, 0))
    difference = divergence = effect = packed_again = 0.0
    tokens = sum(map(len, rows))
    packed = _packed_again(model, plain) if quantized_layers(model) else None
    with torch.no_grad(), _evaluating(model), _evaluating(plain):
        for row in rows:
            adapted, merged = _logits(model, row), _logits(plain, row)
            difference = max(difference, _largest(adapted, merged))
            divergence += _divergence(adapted, merged) / tokens
            if packed is not None:
                packed_again += _divergence(adapted, _logits(packed, row)) / tokens
            with _base_alone(model) as differs:
                if differs:
                    effect += _divergence(adapted, _logits(model, row), spoken=True) / tokens
    return MergeReport(
        str(plain.dtype).removeprefix("torch."),
        tuple(layer_losses(model, plain)),
        tokens,
        difference,
        divergence,
        effect,
        None if packed is None else packed_again,
    )


def _packed_again(model: PreTrainedModel, plain: PreTrainedModel) -> PreTrainedModel:
    """Return the merged model with those layers packed that are so in the base, as they are."""
    shared = [*plain.parameters(), *plain.buffers()]
    packed = copy.deepcopy(plain, {id(tensor): tensor for tensor in shared}).eval()
    for path, layer in quantized_layers(model).items():
        own = path.removesuffix(".original")
        place: Any = packed.get_submodule(own)
        weight = place.weight.T if layer.transposed else place.weight
        codes = layer.quantized_weight.quantize(weight.contiguous(), plain.dtype)
        packed.set_submodule(own, QuantizedLinear(codes, place, transposed=layer.transposed))
    return packed


def _logits(model: PreTrainedModel, row: Sequence[int]) -> Tensor:
    """Return the logits (tokens, words) of one row."""
    ids = torch.tensor([list(row)], device=model.device)
    logits: Tensor = model(ids, use_cache=False).logits[0]
    return logits


def _largest(adapted: Tensor, merged: Tensor) -> float:
    """Return the largest difference of any logit, infinite where one is no number."""
    there = torch.isfinite(adapted)  # not: words that nobody can say
    apart = (merged.float() - adapted.float())[there].abs().max()
    return float(apart.nan_to_num(torch.inf))


def _divergence(p: Tensor, q: Tensor, *, spoken: bool = False) -> float:
    """Return Σ KL(p ‖ q) over tokens, in nats, of logits (tokens, words).

    Infinite where q is no number; with `spoken`, over those words only that q can say at all.
    """
    total = 0.0
    for a, b in zip(p.split(ROWS_AT_ONCE), q.split(ROWS_AT_ONCE), strict=True):
        there = torch.isfinite(b)
        if spoken:
            a = a.masked_fill(~there, -torch.inf)
        a, b = (x.log_softmax(-1, dtype=torch.float64) for x in (a, b))
        each = torch.where(torch.isneginf(a), 0.0, a.exp() * (a - b))
        total += float(each.sum().nan_to_num(torch.inf))
    return total


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _base_alone(model: PreTrainedModel) -> Iterator[bool]:
    """Let no adapter act while the context lasts; yield whether that makes a difference."""
    acting = in_use(model)
    if not any(layer.active() for _, layer in lora_layers(model)):
        yield False
        return
    use(model, None)
    try:
        yield True
    finally:
        use(model, acting)
