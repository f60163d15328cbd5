"""Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2): q, k and v come from latents.

    c = W_a norm(x)     q = W_q norm(c_q)     (k', v) = W_kv norm(c_kv)     k = (k', turned(r))

c holds the latent c_kv and r, the dims that turn, which all heads share. q may come from x itself.
The backward pass computes norms of latents again; these are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from veneer.fused.block import Back, SelfAttention, empty
from veneer.kernels.arena import Arena
from veneer.kernels.norm import Norm
from veneer.lowrank.group import Group, Projection
from veneer.lowrank.projection import (
    gradient_of_h,
    gradient_of_x,
    gradients_of_trained,
    project,
    through_gains,
)


@dataclass(frozen=True)
class Expansion:
    """W norm(latent), (tokens, out), where the latent is the first numbers of what a projection
    gives, as many as W reads. group: W alone, with its adapters."""

    norm: Norm | None
    group: Group

    def forward(self, y: Tensor, arena: Arena) -> list[Tensor]:
        """Return A x and the output; y (tokens, latent or more)."""
        latent, _ = self._normed(y)
        h, out = empty(latent, self.group, arena)
        project(latent, self.group, [out], h)
        return [h, out]

    def backward(
        self, d_out: Tensor, y: Tensor, h: Tensor, out: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the gradients of the latent and of what trains. d_out is written over."""
        latent, statistics = self._normed(y)
        dz, d_gains = through_gains([d_out], [out], self.group, in_place=True)
        dh = gradient_of_h(dz, self.group)
        d_trained = gradients_of_trained(dz, d_gains, dh, latent, h, self.group)
        d_latent = gradient_of_x(dz, dh, self.group)
        if self.norm is not None:
            assert statistics is not None
            d_latent = self.norm.backward(d_latent, self._latent(y), statistics, None)
        return d_latent, d_trained

    def _latent(self, y: Tensor) -> Tensor:
        return y[:, : self.group[0].weight.shape[1]]

    def _normed(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        latent = self._latent(y)
        return (latent, None) if self.norm is None else self.norm.forward(latent)


@dataclass(frozen=True)
class LatentAttention(SelfAttention):
    """The half that mixes tokens, over latents. inputs: what gives q or its latent, and what gives
    the latent of k and v, with the dims that turn behind it."""

    _: KW_ONLY
    q: Expansion | None
    kv: Expansion

    @property
    def between(self) -> Sequence[Projection]:
        return [*self.kv.group, *(() if self.q is None else self.q.group)]

    def project(self, x: Tensor) -> list[Tensor]:
        h, q, compressed = super().project(x)
        projected = [h, q, compressed, *self.kv.forward(compressed, self.arena)]
        return projected if self.q is None else [*projected, *self.q.forward(q, self.arena)]

    def forward(self, outputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return super().forward(self._read_by_heads(outputs))

    def backward(self, dy: Tensor, outputs: Sequence[Tensor], kept: Sequence[Tensor]) -> Back:
        own_q, compressed, h_kv, expanded, *of_q = outputs
        read = self._read_by_heads(outputs)
        dq, d_shared, d_expanded = self.back_to_outputs(dy, read, kept)
        d_latent, d_between = self.kv.backward(d_expanded, compressed, h_kv, expanded)
        if self.q is not None:
            dq, d_of_q = self.q.backward(dq, own_q, *of_q)
            d_between += d_of_q
        d_inputs = [dq, torch.cat([d_latent, d_shared], 1)]
        gradients = through_gains(d_inputs, [own_q, compressed], self.inputs, in_place=True)
        return Back(*gradients, kept[0], d_between)

    def _read_by_heads(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        own_q, compressed, _, expanded, *of_q = outputs
        return [of_q[1] if of_q else own_q, compressed, expanded]
