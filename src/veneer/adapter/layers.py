"""The adapted layers: one class for each kind of base layer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapter.active import ActiveAdapters
from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.adapter.state_dict import as_the_base_does, as_wrapped
from veneer.adapter.tokens import TrainedTokens
from veneer.adapter.weight_access import Place
from veneer.lowrank.autograd import LowRankLinear
from veneer.lowrank.formula import delta_weight, merged_weight, new_A, rescaled, updated_norms
from veneer.lowrank.initial import start_factors
from veneer.lowrank.projection import Projection
from veneer.lowrank.update import LowRankUpdate, Rows, total_gain
from veneer.quant.weight import QuantizedLinear, QuantizedWeight, dense, linear, row_squares

# Up to so many ranks in all, and tokens, adapters of different rows are stacked and masked; beyond,
# each is laid over its own rows. 16 rows with 16 adapters of rank 8 take 0.4 ms stacked and 1.4 ms
# each on its own; 64 rows with 64 of rank 64, 7.6 and 6.1 (`python -m bench.mixed_products`).
STACKED_RANKS, STACKED_TOKENS = 1024, 64


class Wrapper(nn.Module):
    """A frozen `original` with something laid over it.

    In state dicts its weights keep the names that they have in the base.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original.requires_grad_(False)
        self.training = original.training
        self.register_state_dict_post_hook(as_the_base_does)
        self.register_load_state_dict_pre_hook(as_wrapped)

    def __getattr__(self, name: str) -> Any:
        # Model code reads attributes of the layer that it knows (weight, in_features, nf).
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("original"), name)


class AdaptedLayer(Wrapper):
    """A frozen `original` with named adapters over it; `active_adapters` says which of them act.

    tokens: by adapter, rows of single words, where the original is an embedding or a head.

    Those of weights w are summed: W + Σ w ΔW with ΔW = s B A, or of DoRA (Liu et al. 2024, section
    4) ΔW = g ∘ (W + s B A) − W, where g = m / ‖W + s B A‖ for each row. The norm counts as a
    constant on the way back (section 4.3).
    """

    def __init__(self, original: nn.Module, active_adapters: ActiveAdapters) -> None:
        super().__init__(original)
        self.adapters = nn.ModuleDict()
        self.tokens = nn.ModuleDict()
        self.active_adapters = active_adapters
        self.kept_squares: Tensor | None = None
        self.register_load_state_dict_pre_hook(_forget_lengths)

    @property
    def frozen(self) -> Tensor | QuantizedWeight:
        """The frozen W, as (out, in) for a linear layer and (words, dim) for an embedding."""
        if isinstance(self.original, QuantizedLinear):
            return self.original.quantized_weight
        weight: Tensor = self.original.weight  # type: ignore[assignment]
        return self.oriented(weight)

    @property
    def frozen_weight(self) -> Tensor:
        """`frozen` as a tensor, unpacked anew at each look where it is packed."""
        return dense(self.frozen)

    def oriented(self, weight: Tensor) -> Tensor:
        """Return a weight in the orientation of `frozen_weight` from the one that is stored."""
        return weight

    def stored(self, weight: Tensor) -> Tensor:
        """Return a weight as it is stored from the orientation of `frozen_weight`."""
        return self.oriented(weight)

    def by_outputs(self, weight: Tensor) -> Tensor:
        """Return a weight as (out, in) from the orientation of `frozen_weight`, and back."""
        return weight

    def frozen_times(self, A: Tensor) -> Tensor:
        """Return W Aᵀ (out, rank) for A (rank, in), in W's dtype."""
        raise NotImplementedError

    def add(self, name: str, config: LoRA, path: str, generator: torch.Generator | None) -> None:
        """Add a fresh adapter, which leaves the layer's output as it is."""
        raise NotImplementedError

    def put(self, name: str, adapter: Adapter) -> None:
        """Lay an adapter with given tensors over the layer, on the layer's device."""
        device = self.frozen.device
        # To ask is a hundred times cheaper than to move.
        self.adapters[name] = adapter if adapter.lora_A.device == device else adapter.to(device)

    def _put_fresh(self, name: str, adapter: Adapter, config: LoRA) -> None:
        """Lay an adapter that adds nothing yet over the layer, with W's own lengths for DoRA."""
        self.put(name, adapter)
        if config.dora:
            self.begin_magnitude(adapter)

    def begin_magnitude(self, adapter: Adapter) -> None:
        """Let an adapter's magnitudes start as the lengths of the rows of W + s B A."""
        # By the very function that they are divided by later: 1 has to be 1 to the bit.
        norms = self._norms(adapter, adapter.factors()[0])
        adapter.magnitude = nn.Parameter(norms.masked_fill(self._squares() == 0, 0.0))

    def put_tokens(self, name: str, tokens: TrainedTokens) -> None:
        """Lay rows of single words over the layer, on the layer's device."""
        self.tokens[name] = tokens.to(self.frozen.device)

    @property
    def bare(self) -> bool:
        """Whether nothing lies over the layer any more."""
        return not self.adapters and not self.tokens

    @property
    def acts(self) -> bool:
        """Whether something that acts lies over the layer."""
        return bool(self.active() or self.acting_tokens())

    def acting_tokens(self) -> list[tuple[TrainedTokens, float]]:
        """Return the rows of single words that act here, with their weights."""
        pairs = []
        for name, weight in self.active_adapters.weights.items():
            if name in self.tokens:
                tokens = self.tokens[name]
                assert isinstance(tokens, TrainedTokens)
                pairs.append((tokens, weight))
        return pairs

    def acting_bias(self, pairs: list[tuple[Adapter, float]]) -> Tensor | None:
        """Return b + Σ w s b_B, (out,), the original's own b where no adapter has a bias."""
        own: Tensor | None = getattr(self.original, "bias", None)
        parts = [
            adapter.lora_bias * (weight * adapter.scaling)
            for adapter, weight in pairs
            if adapter.lora_bias is not None
        ]
        if not parts:
            return own
        total = torch.stack(parts).sum(0)
        return (total if own is None else total + own).to(self.frozen.dtype)

    def active(self) -> list[tuple[Adapter, float]]:
        """Return the adapters that act here, with their weights."""
        return self.named(self.active_adapters.weights.items())

    def named(self, wanted: Iterable[tuple[str, float]]) -> list[tuple[Adapter, float]]:
        """Return the adapters of these names that lie here, with their weights."""
        pairs = []
        for name, weight in wanted:
            if name in self.adapters:
                adapter = self.adapters[name]
                assert isinstance(adapter, Adapter)
                pairs.append((adapter, weight))
        return pairs

    @property
    def computing(self) -> torch.dtype:
        """The dtype in which A and B are multiplied outside of training."""
        return self.frozen.dtype

    def acting(self, pairs: list[tuple[Adapter, float]], dtype: torch.dtype) -> LowRankUpdate:
        """Return adapters with their weights as one, differentiably."""
        factors = [adapter.factors() for adapter, _ in pairs]
        As = [A.to(dtype) for A, _ in factors]
        gain, shares = self._gains(pairs, As)
        Bs = []
        for (adapter, weight), (_, B), share in zip(pairs, factors, shares, strict=True):
            scaled = B * (weight * adapter.scaling)
            Bs.append(scaled if share is None else scaled * share[:, None])
        return LowRankUpdate(_joined(As, 0), _joined(Bs, 1).to(dtype), gain)

    def _gains(
        self, pairs: list[tuple[Adapter, float]], As: list[Tensor]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gain of W, (out,), and of each adapter's B A beside it, or None for 1."""
        gains = [
            None if adapter.magnitude is None else adapter.magnitude / self._norms(adapter, A)
            for (adapter, _), A in zip(pairs, As, strict=True)
        ]
        return total_gain(gains, [weight for _, weight in pairs])

    @torch.no_grad()
    def _norms(self, adapter: Adapter, A: Tensor) -> Tensor:
        """Return ‖W + s B A‖ of each row, (out,), or 1 for a row of zeros.

        A: the adapter's, in the dtype of computing. Norms are kept while nobody trains A or B.
        """
        weights = (adapter.lora_A, adapter.lora_B)
        state = [(w._version, w.device, w.dtype) for w in weights]
        trains = any(w.requires_grad for w in weights)
        if not trains and adapter.kept_norms is not None and adapter.kept_norms[0] == state:
            return adapter.kept_norms[1]
        with torch.autocast(A.device.type, enabled=False):
            squares = self._squares()
            wide, B = (factor.to(squares.dtype) for factor in adapter.factors())
            norms = updated_norms(squares, self.frozen_times(A), wide, B, adapter.scaling)
        # An optimizer may write where versions are not counted.
        adapter.kept_norms = None if trains else (state, norms)
        return norms

    @torch.no_grad()
    def _squares(self) -> Tensor:
        """Return ‖W‖² of each row of W (out, in), in float32 or wider."""
        frozen, kept = self.frozen, self.kept_squares
        wide = torch.promote_types(frozen.dtype, torch.float32)
        if kept is None or (kept.device, kept.dtype) != (frozen.device, wide):
            weight = frozen if isinstance(frozen, QuantizedWeight) else self.by_outputs(frozen)
            self.kept_squares = kept = row_squares(weight)
        return kept

    def delta(self) -> Tensor:
        """Return Σ w ΔW of the acting adapters, shaped as `frozen_weight`, in float32."""
        frozen = self.frozen
        total = torch.zeros(frozen.shape, dtype=torch.float32, device=frozen.device)
        total = self.by_outputs(total)
        for adapter, weight in self.active():
            A, B = (factor.detach() for factor in adapter.factors())
            change = delta_weight(A, B, adapter.scaling)
            if adapter.magnitude is not None:
                own = self.by_outputs(self.frozen_weight).to(change.dtype)
                change = rescaled(own + change, adapter.magnitude.detach()) - own
            total += weight * change
        total = self.by_outputs(total)
        for tokens, weight in self.acting_tokens():
            total[tokens.ids] += weight * tokens.change().detach()
        return total

    def fuse(self) -> nn.Module:
        """Return a new plain layer with the acting adapters merged in; this one is untouched."""
        merged = merged_weight(self.frozen_weight, self.delta())
        if isinstance(self.original, QuantizedLinear):
            fused = self.original.to_dense(merged)
        else:
            fused = copy.copy(self.original)
            fused._parameters = dict(self.original._parameters)
            fused.weight = nn.Parameter(self.stored(merged).contiguous(), requires_grad=False)
        bias = self.acting_bias(self.active())
        if bias is not getattr(self.original, "bias", None):
            assert bias is not None
            fused.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return fused

    def path_in_base(self, path: str) -> str:
        """Return where the base has what this layer adapts, from the layer's own path."""
        return path

    def take_off(self, model: nn.Module, path: str, *, merged: bool = False) -> None:
        """Let the original stand in `model` at `path` again, or one with what acts merged in."""
        model.set_submodule(path, self.fuse() if merged else self.original)

    def weight_in(self, plain: nn.Module, path: str) -> Tensor:
        """Return the weight that `plain` has at `path`, in the orientation of `frozen_weight`."""
        weight: Tensor = plain.get_submodule(path).weight  # type: ignore[assignment]
        if isinstance(self.original, QuantizedLinear):
            return weight.T if self.original.transposed else weight
        return self.oriented(weight)


class LoRALinear(AdaptedLayer):
    """Return gain ∘ (W x + Σ scaling · B (A x)) + b.

    `transposed` says that the original keeps its weight as (in, out), as transformers' Conv1D does.
    """

    def __init__(
        self, original: nn.Module, active_adapters: ActiveAdapters, *, transposed: bool = False
    ) -> None:
        super().__init__(original, active_adapters)
        self.transposed = transposed
        self.place: Place | None = None

    @property
    def weight(self) -> Tensor:
        """The weight as it acts, gain ∘ (W + B A) as the original stores it, differentiably.

        For model code that computes with a layer's weight instead of calling the layer (Mamba's
        dt_proj, fused kernels). What is asked for its dtype alone is the original's own. A dropout
        of adapters' inputs has no place here, and none is made.
        """
        active = self.active()
        if not active or (self.place and self.place.is_looked_at):
            return self.original.weight  # type: ignore[return-value]
        frozen = self.frozen_weight
        with torch.autocast(frozen.device.type, enabled=False):
            one = self.acting(active, frozen.dtype)
            weight = frozen + one.B @ one.A
            if one.gain is not None:
                weight = (weight * one.gain[:, None]).to(frozen.dtype)
        return self.oriented(weight)

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight

    def frozen_times(self, A: Tensor) -> Tensor:
        frozen = self.frozen
        A = A.to(frozen.dtype)
        # A dense W is taken as it lies; as a layer's weight it would be laid out anew for few rows.
        return frozen @ A.T if isinstance(frozen, Tensor) else linear(A, frozen, None).T

    def add(self, name: str, config: LoRA, path: str, generator: torch.Generator | None) -> None:
        out_features, in_features = self.frozen.shape
        rank, scaling = config.rank_of(path), config.scaling_of(path)
        start = start_factors(self.frozen, rank, scaling, config.init, generator)
        if start is None:
            A = new_A(rank, in_features, config.init, generator)
            B = torch.zeros(out_features, rank)
        else:
            A, B = (factor.clone() for factor in start)
        adapter = Adapter(A, B, scaling=scaling, dropout=config.dropout, start=start)
        adapter.lora_A.requires_grad_(not config.lora_fa)
        self._put_fresh(name, adapter, config)

    def projection(self) -> Projection | None:
        """Return the layer as it acts now, or None where it cannot be had as one product of a
        frozen weight."""
        active = self.active()
        if self.training and any(adapter.dropout for adapter, _ in active):
            return None
        bias = self.acting_bias(active)
        if (bias is not None and bias.requires_grad) or self.acting_tokens():
            return None
        if any(weight.requires_grad for weight in self.original.parameters()):
            return None
        if not active:
            return Projection.plain(self.frozen, bias)
        one = self.acting(active, self.frozen.dtype)
        return Projection(self.frozen, bias, one.A, one.B, one.gain)

    def forward(self, x: Tensor) -> Tensor:
        if self.active_adapters.rows is not None:
            return self._by_rows(x, self.active_adapters.rows)
        y = self._adapted(x)
        for tokens, weight in self.acting_tokens():
            y = tokens.onto_logits(y, x, weight)
        return y

    def _adapted(self, x: Tensor) -> Tensor:
        active = self.active()
        if not active:
            return self.original(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        # Adapters whose inputs are dropped out need a mask each; all others act as one,
        # their A stacked and their B side by side.
        dropped = [pair for pair in active if self.training and pair[0].dropout]
        together = [pair for pair in active if pair not in dropped]
        first = together or [dropped.pop(0)]
        p = first[0][0].dropout if self.training else 0.0
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        keep = F.dropout(torch.ones_like(flat), p) if p else None
        one = self.acting([*first, *dropped], x.dtype)
        ranks = [sum(_rank(a) for a, _ in first), *(_rank(a) for a, _ in dropped)]
        (A, *As), (B, *Bs) = one.A.split(ranks), one.B.split(ranks, 1)
        bias = self.acting_bias(active)
        y = LowRankLinear.apply(flat, self.frozen, bias, A, B, keep)  # (tokens, out)
        y = y.view(*x.shape[:-1], y.shape[-1])
        for (adapter, _), A, B in zip(dropped, As, Bs, strict=True):
            y = y + F.linear(F.linear(F.dropout(x, adapter.dropout), A), B)
        if one.gain is not None:
            # A bias is not scaled; said like this, a gain of 1 changes no bit.
            y = y * one.gain if bias is None else y * one.gain + bias * (1 - one.gain)
        return y.to(x.dtype)

    def _by_rows(self, x: Tensor, rows: Rows) -> Tensor:
        """Return the output for x (rows, tokens, in), where each row has adapters of its own."""
        assert len(x) == len(rows.which), (x.shape, len(rows.which))
        y = self.original(x)  # (rows, tokens, out)
        parts = rows.over(self)
        if not parts:
            return y
        ranks = sum(one.rank for one, _ in parts)
        if ranks <= STACKED_RANKS and x.shape[:2].numel() <= STACKED_TOKENS:
            all_ = rows.stacked(self, parts)
            h = F.linear(x, all_.A) * all_.mask  # (rows, tokens, Σ rank)
            y, gain = y + F.linear(h, all_.B), all_.gain
        else:
            gain = rows.gains(parts)
            for one, own in parts:
                y[list(own)] += F.linear(F.linear(x[list(own)], one.A), one.B)
        if gain is not None:
            bias: Tensor | None = self.original.bias  # type: ignore[assignment]
            y = y * gain if bias is None else y * gain + bias * (1 - gain)
        return y.to(x.dtype)


class LoRAEmbedding(AdaptedLayer):
    """Return gain ∘ (E[ids] + Σ scaling · B A[:, ids]), over nn.Embedding.

    Here A (rank, words) starts at zero and B (dim, rank) is random, as in loralib: the rows of
    words that the data never shows then stay exactly where they were. As W, E is (dim, words).
    """

    def by_outputs(self, weight: Tensor) -> Tensor:
        return weight.T

    @property
    def computing(self) -> torch.dtype:
        return torch.promote_types(self.frozen.dtype, torch.float32)

    def frozen_times(self, A: Tensor) -> Tensor:
        frozen = self.frozen_weight
        return frozen.T @ A.to(frozen.dtype).T

    def add(self, name: str, config: LoRA, path: str, generator: torch.Generator | None) -> None:
        words, dim = self.frozen.shape
        rank = config.rank_of(path)
        A = torch.zeros(rank, words)
        B = torch.randn(dim, rank, generator=generator)
        adapter = Adapter(A, B, scaling=config.scaling_of(path))
        adapter.lora_B.requires_grad_(not config.lora_fa)
        self._put_fresh(name, adapter, config)

    def forward(self, ids: Tensor) -> Tensor:
        if self.active_adapters.rows is not None:
            return self._by_rows(ids, self.active_adapters.rows)
        y = self._adapted(ids)
        for tokens, weight in self.acting_tokens():
            padding: int | None = self.original.padding_idx  # type: ignore[assignment]
            change = tokens.of_words(ids, padding=padding)  # (..., dim)
            scale = weight * getattr(self.original, "embed_scale", 1.0)
            y = (y + change * scale).to(y.dtype)
        return y

    def _adapted(self, ids: Tensor) -> Tensor:
        y = self.original(ids)
        active = self.active()
        if not active:
            return y
        return self._changed(y, ids, self.acting(active, active[0][0].lora_A.dtype))

    def _by_rows(self, ids: Tensor, rows: Rows) -> Tensor:
        """Return rows of the embedding for ids (rows, tokens), each row with its own adapters."""
        y = self.original(ids)
        for one, own in rows.over(self):
            y[list(own)] = self._changed(y[list(own)], ids[list(own)], one)
        return y

    def _changed(self, y: Tensor, ids: Tensor, one: LowRankUpdate) -> Tensor:
        delta = F.linear(F.embedding(ids, one.A.T), one.B)  # (..., dim)
        y = y + delta.to(y.dtype) * getattr(self.original, "embed_scale", 1.0)
        return y if one.gain is None else (y * one.gain).to(y.dtype)


def _forget_lengths(layer: nn.Module, *_loaded: object) -> None:
    """Forget what is known of W, and of W + s B A, in whose place another is loaded."""
    assert isinstance(layer, AdaptedLayer)
    layer.kept_squares = None
    for adapter in layer.adapters.values():
        assert isinstance(adapter, Adapter)
        adapter.kept_norms = None


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _rank(adapter: Adapter) -> int:
    """Return the rank of the factors as they act."""
    return adapter.rank if adapter.start is None else 2 * adapter.rank


def lora_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Yield (path in the base, layer) of every adapted layer or parameter."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield module.path_in_base(path), module


def idle_adapters(model: nn.Module) -> Iterator[Adapter]:
    """Yield the adapters that are attached but do not act."""
    for _, layer in lora_layers(model):
        for name, adapter in layer.adapters.items():
            if name not in layer.active_adapters.weights:
                assert isinstance(adapter, Adapter)
                yield adapter
