"""LoRA over a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from veneer.adapter.active import ActiveAdapters, Segments
from veneer.adapter.adapter import Adapter
from veneer.adapter.config import LoRA
from veneer.adapter.layers import AdaptedLayer
from veneer.adapter.weight_access import Place
from veneer.errors import AdapterError
from veneer.kernels import choice
from veneer.kernels.dropout import Mask
from veneer.kernels.gain import apply_gain
from veneer.lowrank.formula import new_A
from veneer.lowrank.group import Masks, Projection
from veneer.lowrank.initial import start_factors
from veneer.lowrank.linear import LowRankLinear, ProjectedSegments
from veneer.lowrank.update import RowsOfUpdate, RowUpdates
from veneer.quant.weight import linear

# Up to so many ranks in all, and tokens, updates of different rows are stacked and masked; beyond,
# each is applied to its own rows. 16 rows with 16 adapters of rank 8 take 0.4 ms stacked and 1.4 ms
# each on its own; 64 rows with 64 of rank 64, 7.6 and 6.1 (`python -m bench.mixed_products`).
STACKED_RANKS, STACKED_TOKENS = 1024, 64


class LoRALinear(AdaptedLayer):
    """Return gain ∘ (W x + Σ scaling · B (A x)) + b.

    transposed: whether the original keeps its weight as (in, out), as transformers' Conv1D does.
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
        dt_proj, fused kernels). Code that only asks for the weight's dtype gets the original's own;
        so does torch, which asks for the weights that FSDP2 holds in pieces, by their names.
        A dropout of adapters' inputs cannot be expressed in a weight, and is left out. Raises
        AdapterError while each row of a batch has adapters of its own: there is no one weight then.
        """
        if not self._acts_here() or (self.place and self.place.is_looked_at) or self._is_sharded():
            return self.original.weight  # type: ignore[return-value]
        if self.acts_on(torch.float32) is not None:
            raise AdapterError(
                f"The model's code computes with the weight of {self._name}, which cannot act from "
                "an invocation on; leave it out of the targets."
            )
        if self.active_adapters.row_updates is not None or self.active_adapters.segments:
            raise AdapterError(
                f"The model's code computes with the weight of {self._name}, so rows of a batch "
                "cannot each have adapters of their own; use one adapter for the whole batch."
            )
        active = self.active()
        W = self.dense_base_weight
        with torch.autocast(W.device.type, enabled=False):
            update = self.low_rank_update(active, W.dtype)
            weight = W + update.B @ update.A
            if update.gain is not None:
                weight = apply_gain(weight, update.gain[:, None], None).to(W.dtype)
        return self.oriented(weight)

    def _acts_here(self) -> bool:
        """Return whether an adapter acts on this layer, if only on some rows."""
        active = self.active_adapters
        if active.segments is not None:
            return any(name in self.adapters for name, *_ in active.segments.of_adapters)
        return bool(self.active() if active.row_updates is None else active.row_updates.on(self))

    def _is_sharded(self) -> bool:
        return any(isinstance(adapter.lora_A, DTensor) for adapter, _ in self.active())

    def oriented(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight

    def base_weight_times(self, A: Tensor) -> Tensor:
        W = self.base_weight
        A = A.to(W.dtype)
        # A dense W is used in place; as the weight of F.linear it would be copied for few rows.
        return W @ A.T if isinstance(W, Tensor) else linear(A, W, None).T

    def add(self, name: str, config: LoRA, path: str, generator: torch.Generator | None) -> None:
        out_features, in_features = self.base_weight.shape
        rank, scaling = config.rank_of(path), config.scaling_of(path)
        start = start_factors(self.base_weight, rank, scaling, config.init, generator)
        if start is None:
            A = new_A(rank, in_features, config.init, generator)
            B = torch.zeros(out_features, rank)
        else:
            A, B = (factor.clone() for factor in start)
        adapter = Adapter(A, B, scaling=scaling, dropout=config.dropout, start=start)
        adapter.lora_A.requires_grad_(not config.lora_fa)
        self._attach_fresh(name, adapter, config)

    def projection(self) -> Projection | None:
        """Return the layer as it acts now, or None where it is more than one product of a frozen
        weight."""
        active = self.active()
        bias = self.active_bias(active)
        if (bias is not None and bias.requires_grad) or self.active_tokens():
            return None
        W = self.base_weight
        if isinstance(W, Tensor) and W.requires_grad:
            return None
        if (segments := self.active_adapters.segments) is not None:
            return self._by_segments(segments, W.dtype)
        return self._projection(active, bias, W.dtype, acts_on=self.acts_on(W.dtype))

    def _projection(
        self,
        pairs: list[tuple[Adapter, float]],
        bias: Tensor | None,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
        acts_on: Tensor | None = None,
    ) -> Projection:
        W = self.base_weight
        if not pairs:
            return Projection.plain(W, bias)
        masks = self._masks(pairs, generator)
        if (masters := self.masters(pairs, masks)) is not None:
            return Projection(
                *(W, bias, *masters.rounded(dtype)), masks=masks, masters=masters, acts_on=acts_on
            )
        update = self.low_rank_update(pairs, dtype, masks)
        return Projection(W, bias, update.A, update.B, update.gain, masks, acts_on=acts_on)

    def _by_segments(self, segments: Segments, dtype: torch.dtype) -> Projection:
        """Return the projection in which each adapter acts on its own tokens."""
        bias = self.active_bias([])
        own = []
        for name, tokens, generator in segments.of_adapters:
            acts_on = self.acts_on(dtype, (name,))
            acts_on = None if acts_on is None else acts_on[tokens]
            pairs = self.named([(name, 1.0)])
            own.append((tokens, self._projection(pairs, bias, dtype, generator, acts_on)))
        return replace(Projection.plain(self.base_weight, bias), segments=tuple(own))

    def forward(self, x: Tensor) -> Tensor:
        if (segments := self.active_adapters.segments) is not None:
            return self._with_segments(x, segments)
        if self.active_adapters.row_updates is not None:
            return self._by_rows(x, self.active_adapters.row_updates)
        y = self._adapted(x)
        for tokens, weight in self.active_tokens():
            y = tokens.onto_logits(y, x, weight)
        return y

    def _adapted(self, x: Tensor) -> Tensor:
        active = self.active()
        if not active:
            return self.original(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        masks = self._masks(active)
        update = self.low_rank_update(active, x.dtype, masks)
        bias = self.active_bias(active)
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        acts_on = self.acts_on(x.dtype)
        if acts_on is not None and len(acts_on) != len(flat):
            raise AdapterError(
                f"{self._name} reads {len(flat)} rows of a batch of {len(acts_on)} tokens, so "
                "nobody knows on which an adapter acts from its invocation on; leave the layer out "
                "of its targets."
            )
        y = LowRankLinear.apply(flat, self.base_weight, bias, update.A, update.B, masks, acts_on)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if update.gain is None else apply_gain(y, update.gain, bias).to(x.dtype)

    def _masks(
        self, pairs: list[tuple[Adapter, float]], generator: torch.Generator | None = None
    ) -> Masks:
        """Return a new mask for each adapter that drops its inputs, as this layer is training."""
        if not self.training or not any(adapter.dropout for adapter, _ in pairs):
            return ()
        return tuple(
            (adapter.total_rank, Mask.drawn(p, generator) if (p := adapter.dropout) else None)
            for adapter, _ in pairs
        )

    def _with_segments(self, x: Tensor, segments: Segments) -> Tensor:
        """Return the output for the tokens of a packed batch, x (1, tokens, in) or (tokens, in)."""
        flat = x.reshape(-1, x.shape[-1])
        segments.check(flat, self._name)
        projection = self._by_segments(segments, x.dtype)
        y: Tensor = ProjectedSegments.apply(flat, projection, *projection.trained())
        return y.view(*x.shape[:-1], y.shape[-1])

    @property
    def _name(self) -> str:
        return self.place.name if self.place else "an adapted layer"

    def _by_rows(self, x: Tensor, row_updates: RowUpdates) -> Tensor:
        """Return the output for x (rows, tokens, in), where each row has adapters of its own.

        A mixture gives its shared experts all tokens as one, (rows · tokens, in); latent attention
        gives what it has cached, (rows, heads, tokens, in).
        """
        rows_of_x = len(row_updates.mix_of_row)
        if x.ndim != 3:
            y = self._by_rows(x.reshape(rows_of_x, -1, x.shape[-1]), row_updates)
            return y.view(*x.shape[:-1], y.shape[-1])
        assert len(x) == rows_of_x, (x.shape, rows_of_x)
        y = self.original(x)  # (rows, tokens, out)
        updates = row_updates.on(self)
        if not updates:
            return y
        ranks = sum(each.update.rank for each in updates)
        few = ranks <= STACKED_RANKS and x.shape[:2].numel() <= STACKED_TOKENS
        if _finds_own_rows(x, y, updates):
            from veneer.kernels.triton_mixed import add_own

            table, gain = row_updates.addressed(self, updates)
            y = add_own(x.contiguous(), y, row_updates.numbers_on(x.device), table)
        elif few or row_updates.numbers is not None:
            stacked = row_updates.stacked(self, updates)
            h = F.linear(x, stacked.A)  # (rows, tokens, Σ rank)
            h = h if stacked.mask is None else h * stacked.mask
            y, gain = y + F.linear(h, stacked.B), stacked.gain
        else:
            gain = row_updates.gains(updates)
            for each in updates:
                rows, update = row_updates.rows_on(each, x.device), each.update
                y[rows] += F.linear(F.linear(x[rows], update.A), update.B)
        if gain is not None:
            bias: Tensor | None = self.original.bias  # type: ignore[assignment]
            y = apply_gain(y, gain, bias)
        if (own_bias := row_updates.biases(updates)) is not None:
            y = y + own_bias
        return y.to(x.dtype)


def _finds_own_rows(x: Tensor, y: Tensor, updates: Sequence[RowsOfUpdate]) -> bool:
    """Return whether the kernel by which each row finds its own factors takes these tensors. It
    has no gradient, and adds to y in place."""
    factors = [factor for each in updates for factor in (each.update.A, each.update.B)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *factors)):
        return False
    dtypes = {t.dtype for t in (x, y, *factors)}
    way = choice.mixed(choice.device_of(x.device), *dtypes)
    return way == "triton" and len(dtypes) == 1 and y.is_contiguous()
