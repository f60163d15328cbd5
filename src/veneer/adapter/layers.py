"""What all adapted layers share, whatever they compute: norms, gains, biases and merging."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from veneer.adapter.active import ActiveAdapters
from veneer.adapter.adapted import Adapted
from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.adapter.tokens import TrainedTokens
from veneer.adapter.wrapper import Wrapper
from veneer.lowrank.formula import merged_weight, updated_norms
from veneer.lowrank.group import Masks
from veneer.lowrank.masters import Masters
from veneer.lowrank.update import LowRankUpdate, mixed
from veneer.quant.weight import QuantizedLinear, QuantizedWeight, kept_weight, row_squares


class AdaptedLayer(Adapted, Wrapper):
    """A frozen layer `original` with named adapters over its weight."""

    def __init__(self, original: nn.Module, active_adapters: ActiveAdapters) -> None:
        super().__init__(active_adapters, original=original)
        self.cached_squares: Tensor | None = None
        self.register_load_state_dict_pre_hook(_forget_norms)

    @property
    def base_weight(self) -> Tensor | QuantizedWeight:
        weight = kept_weight(self.original)
        return weight if isinstance(weight, QuantizedWeight) else self.oriented(weight)

    @property
    def shape(self) -> torch.Size:
        weight = kept_weight(self.original)
        if isinstance(weight, QuantizedWeight):
            return weight.shape
        # Of a sharded weight that is not whole there is no view, and so no transposed one.
        return self.oriented(torch.empty(weight.shape, device="meta")).shape

    @property
    def device(self) -> torch.device:
        return kept_weight(self.original).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which A and B are multiplied outside of training."""
        return self.base_weight.dtype

    def base_weight_times(self, A: Tensor) -> Tensor:
        """Return W Aᵀ (out, rank) for A (rank, in), in W's dtype."""
        raise NotImplementedError

    def attach_tokens(self, name: str, tokens: TrainedTokens) -> None:
        """Attach rows of single tokens, on the layer's device."""
        self.tokens[name] = tokens.to(self.device)

    def start_magnitude(self, adapter: Adapter) -> None:
        """Start an adapter's magnitudes as the norms of the rows of W + s B A."""
        # By the function that also makes the later divisor, so that the first gain is exactly 1.
        norms = self._norms(adapter, adapter.factors()[0])
        adapter.magnitude = nn.Parameter(norms.masked_fill(self._squares() == 0, 0.0))

    def _attach_fresh(self, name: str, adapter: Adapter, config: LoRA) -> None:
        """Attach an adapter that adds nothing yet; the magnitudes of DoRA start as W's norms."""
        self.attach(name, adapter)
        if config.dora:
            self.start_magnitude(adapter)

    def acting_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters on which the layer's output depends now."""
        adapters = [adapter for adapter, _ in self.active()]
        for module in (self.original, *adapters, *(tokens for tokens, _ in self.active_tokens())):
            yield from module.parameters()

    def active_bias(self, pairs: list[tuple[Adapter, float]]) -> Tensor | None:
        """Return b + Σ w s b_B, (out,); the original's own b where no adapter has a bias."""
        bias: Tensor | None = getattr(self.original, "bias", None)
        changes = [
            adapter.lora_bias * (weight * adapter.scaling)
            for adapter, weight in pairs
            if adapter.lora_bias is not None
        ]
        if not changes:
            return bias
        total = torch.stack(changes).sum(0)
        return (total if bias is None else total + bias).to(self.base_weight.dtype)

    def low_rank_update(
        self, pairs: list[tuple[Adapter, float]], dtype: torch.dtype, masks: Masks = ()
    ) -> LowRankUpdate:
        """Return adapters with their weights as one update, differentiably.

        masks: those of the adapters' inputs, whose `scale` B takes over.
        """
        updates = []
        for adapter, _ in pairs:
            A, B = adapter.factors()
            A = A.to(dtype)
            gain = None
            if adapter.magnitude is not None:
                gain = adapter.magnitude / self._norms(adapter, A)
            own = adapter.lora_bias
            bias = None if own is None else own.to(B.dtype) * adapter.scaling
            updates.append(LowRankUpdate(A, B, gain, bias))
        return mixed(updates, [weight for _, weight in pairs], _scalings(pairs, masks))

    def masters(self, pairs: list[tuple[Adapter, float]], masks: Masks = ()) -> Masters | None:
        """Return the update of a single plain adapter by what trains in it, or None for others."""
        if len(pairs) != 1:
            return None
        adapter, weight = pairs[0]
        if adapter.magnitude is not None or adapter.start is not None:
            return None
        return Masters(adapter.lora_A, adapter.lora_B, weight * _scalings(pairs, masks)[0])

    @torch.no_grad()
    def _norms(self, adapter: Adapter, A: Tensor) -> Tensor:
        """Return ‖W + s B A‖ of each row, (out,), or 1 for a row of zeros.

        A: the adapter's, in the dtype of computing. Norms are cached while nobody trains A or B.
        """
        weights = (adapter.lora_A, adapter.lora_B)
        state = [(w._version, w.device, w.dtype) for w in weights]
        trains = any(w.requires_grad for w in weights)
        if not trains and adapter.cached_norms is not None and adapter.cached_norms[0] == state:
            return adapter.cached_norms[1]
        with torch.autocast(A.device.type, enabled=False):
            squares = self._squares()
            wide, B = (factor.to(squares.dtype) for factor in adapter.factors())
            norms = updated_norms(squares, self.base_weight_times(A), wide, B, adapter.scaling)
        # An optimizer may change A and B without a new `_version`.
        adapter.cached_norms = None if trains else (state, norms)
        return norms

    @torch.no_grad()
    def _squares(self) -> Tensor:
        """Return ‖W‖² of each row of W (out, in), in float32 or wider."""
        base, cached = self.base_weight, self.cached_squares
        wide = torch.promote_types(base.dtype, torch.float32)
        if cached is None or (cached.device, cached.dtype) != (base.device, wide):
            weight = base if isinstance(base, QuantizedWeight) else self.by_outputs(base)
            self.cached_squares = cached = row_squares(weight)
        return cached

    def fuse(self) -> nn.Module:
        """Return a new plain layer with the active adapters merged in; this one is untouched."""
        merged = merged_weight(self.dense_base_weight, self.delta())
        if isinstance(self.original, QuantizedLinear):
            fused = self.original.to_dense(merged)
        else:
            fused = copy.copy(self.original)
            fused._parameters = dict(self.original._parameters)
            fused.weight = nn.Parameter(self.stored(merged).contiguous(), requires_grad=False)
        bias = self.active_bias(self.active())
        if bias is not getattr(self.original, "bias", None):
            assert bias is not None
            fused.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return fused

    def unwrap(self, model: nn.Module, path: str, *, merged: bool = False) -> None:
        model.set_submodule(path, self.fuse() if merged else self.original)

    def weight_in(self, plain: nn.Module, path: str) -> Tensor:
        weight: Tensor = plain.get_submodule(path).weight  # type: ignore[assignment]
        if isinstance(self.original, QuantizedLinear):
            return weight.T if self.original.transposed else weight
        return self.oriented(weight)


def _scalings(pairs: list[tuple[Adapter, float]], masks: Masks) -> list[float]:
    """Return what each adapter's B is to be multiplied with, its mask's `scale` included."""
    scalings = [adapter.scaling for adapter, _ in pairs]
    for number, (_, mask) in enumerate(masks):
        scalings[number] *= 1.0 if mask is None else mask.scale
    return scalings


def _forget_norms(layer: nn.Module, *_loaded: object) -> None:
    """Forget the cached norms of W and of W + s B A before other weights are loaded."""
    assert isinstance(layer, AdaptedLayer)
    layer.cached_squares = None
    for adapter in layer.adapters.values():
        assert isinstance(adapter, Adapter)
        adapter.cached_norms = None


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Yield (path in the base, adapted layer or parameter) of each one in a model."""
    for path, module in model.named_modules():
        if isinstance(module, Adapted):
            yield module.path_in_base(path), module


def idle_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the adapters of layers, and the rows of single tokens, that are attached but not
    active."""
    for _, layer in lora_layers(model):
        for name, module in (*layer.adapters.items(), *layer.tokens.items()):
            if name not in layer.active_adapters.weights:
                yield module
