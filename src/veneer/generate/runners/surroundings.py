"""What a model does around its decoder layers, for the compiled step: embeddings and angles before
them, a norm and the head behind them. It is found by running the model with its layers passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapter.own_rows import acting, padded
from veneer.adapter.wrapper import unwrapped
from veneer.fused.analyse import is_linear
from veneer.fused.head import Head
from veneer.fused.layers import FusedLayer
from veneer.fused.norms import may_be_norm, norm_of
from veneer.fused.patches import LayerForward, patched
from veneer.fused.rotaries import Angles, rotary_of
from veneer.fused.watch import (
    Call,
    angles_of,
    attention,
    attention_is_asked_for,
    same_memory,
)
from veneer.generate.runners.layer_table import Unsuited, linear_of, plain_linear
from veneer.generate.runners.loaded import LoadedAdapter, row_updates
from veneer.kernels import decode
from veneer.kernels.attention import NAME
from veneer.kernels.cross_entropy import PLAIN
from veneer.kernels.norm import Norm
from veneer.kernels.rotary import Rotary
from veneer.lowrank.update import RowUpdates
from veneer.models.blocks import decoder_of
from veneer.quant.weight import kept_weight

POSITIONS = 1024  # whose angles are computed at once
Adapters = Sequence[LoadedAdapter | None]  # of each token


@dataclass(frozen=True)
class Passed:
    """A pass in which each layer returned its input x (rows, tokens, dim): each layer's angles, and
    what the decoder made of x in the end."""

    x: Tensor
    angles: Sequence[Angles | None]
    last: Tensor


class Surroundings:
    """Embeddings, angles, last norm and head of a model. Raises Unsuited."""

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[FusedLayer], head: Head, context: int
    ) -> None:
        self.model, self.layers, self.dtype = model, layers, model.dtype
        self.head = head
        self._kept: list[Tensor] = []  # what the compiled head points to, beside the model's own
        self._compiled_head = self._as_compiled()
        ids = tokens_of(model, min(POSITIONS, context))
        passed, calls = self._watched_pass(ids, torch.arange(context - ids.shape[1], context)[None])
        if any(is_linear(call.module) for call in calls):
            raise Unsuited("a linear layer makes its embeddings, or follows its layers")
        embedding: Any = model.get_input_embeddings()
        with torch.inference_mode():
            self._embeds_alone = torch.equal(embedding(ids), passed.x)
        self.norm = _last_norm(passed, calls)
        self.angles = self._angles(context)

    def embed(self, ids: Tensor, positions: Tensor, adapters: Adapters) -> Tensor:
        """Return what the first layer reads, (tokens, dim), contiguous and new."""
        own = any(adapter is not None and adapter.own is not None for adapter in adapters)
        x = self._embedded(ids, positions, adapters if own else ())
        for token, adapter in enumerate(adapters):
            if adapter is not None and adapter.embeds:
                # Alone: the rounding of a product may depend on how many rows it has.
                here = slice(token, token + 1)
                x[here] = self._embedded(ids[here], positions[here], [adapter])
        return x

    def _embedded(self, ids: Tensor, positions: Tensor, adapters: Adapters) -> Tensor:
        """Return what the first layer reads. adapters: none for the base alone."""
        embedding: Any = self.model.get_input_embeddings()
        if self._embeds_alone and not adapters:
            return embedding(ids).to(self.dtype).contiguous()
        with acting(self.model, row_updates(adapters) if adapters else None):
            if self._embeds_alone:
                x = embedding(ids[:, None])
            else:
                x = self._pass_over(ids[:, None], positions[:, None]).x
        return x[:, 0].to(self.dtype).contiguous()

    def normed(self, x: Tensor) -> Tensor:
        """Return what the decoder gives of its last layer's x (tokens, dim)."""
        return x if self.norm is None else self.norm.forward(x)[0]

    def logits(self, x: Tensor, adapters: Adapters, compiled: decode.Decode) -> Tensor:
        """Return the logits (tokens, vocab), in float32, of what the last layer gives."""
        x = self.normed(x)
        z = self._product(x.contiguous(), adapters, compiled)
        z, sizes = self._with_own(z, x, adapters, compiled)
        if self.head.logits != PLAIN:
            # One by one: a row's logits may not depend on how many are beside it.
            for row, size in zip(z, sizes, strict=True):
                row[:size].copy_(self.head.logits(row[:size]))
        return z

    def _with_own(
        self, z: Tensor, x: Tensor, adapters: Adapters, compiled: decode.Decode
    ) -> tuple[Tensor, list[int]]:
        """Return what the head gives for x (tokens, dim), z (tokens, vocab), with the rows that
        adapters have for themselves, and how many logits each token has."""
        sizes = [z.shape[1] if a is None or a.own is None else a.own.size for a in adapters]
        z = padded(z, max(sizes, default=0))
        for adapter in dict.fromkeys(adapters):
            own = None if adapter is None else adapter.own
            if own is None or own.head is None:
                continue
            assert own.head_ids is not None
            tokens = torch.tensor([n for n, each in enumerate(adapters) if each is adapter])
            linear = plain_linear(own.head, own.bias)
            z[tokens[:, None], own.head_ids] = compiled.product(x[tokens], linear)
        return z, sizes

    def _product(self, x: Tensor, adapters: Adapters, compiled: decode.Decode) -> Tensor:
        """Return what the head gives, (tokens, vocab), in float32. Where no compiled product does,
        each token goes through the head alone, so that nothing depends on its company."""
        head: Any = self.model.get_output_embeddings()
        linear = self._compiled_head
        if linear is None or not len(x):
            return self._one_by_one(x, adapters)
        z = compiled.product(x, linear)
        for row, adapter in enumerate(adapters):
            if adapter is not None and head in adapter.layers:
                z[row] = self._one_by_one(x[row : row + 1], [adapter])
        return z

    def _one_by_one(self, x: Tensor, adapters: Adapters) -> Tensor:
        vocab = kept_weight(unwrapped(self.model.get_output_embeddings())).shape[0]
        z = torch.empty(len(x), vocab, dtype=torch.float32)
        for row, adapter in enumerate(adapters):
            # Own rows of the head come later.
            layers = [] if adapter is None else [adapter.layers]
            updates = RowUpdates(layers, (0 if layers else None,))
            with acting(self.model, updates):
                z[row] = self.head.product(self.model, x[None, row : row + 1])[0, 0]
        return z

    def _as_compiled(self) -> decode.Linear | None:
        head: Any = self.model.get_output_embeddings()
        if self.head.dtype is not None:  # it reads another dtype
            return None
        try:
            return linear_of(head, self.dtype, self._kept)
        except Unsuited:
            return None

    def _angles(self, context: int) -> list[Rotary | None]:
        """Return the rotation of each layer by the angles of all positions."""
        turns = [layer.variant.turn for layer in self.layers]
        pieces: list[list[Rotary | None]] = []
        alike: list[int] = []  # for each layer the first that has its angles
        for first in range(0, context, POSITIONS):
            positions = torch.arange(first, min(context, first + POSITIONS))[None]
            angles = self._pass_over(torch.zeros_like(positions), positions).angles
            if not alike:
                keys = [(id(pair), turn) for pair, turn in zip(angles, turns, strict=True)]
                alike = [keys.index(key) for key in keys]
            pieces.append(
                [
                    rotary_of(turn, pair, self.dtype) if alike[number] == number else None
                    for number, (pair, turn) in enumerate(zip(angles, turns, strict=True))
                ]
            )
        joined = [_joined(own) for own in zip(*pieces, strict=True)]
        # What depends on the length of the text shows in a text that has the last position in it.
        few = torch.tensor([*range(min(POSITIONS, context)), context - 1])
        far = self._pass_over(torch.zeros_like(few)[None], few[None]).angles
        others = [rotary_of(turn, pair, self.dtype) for pair, turn in zip(far, turns, strict=True)]
        own = [joined[number] for number in alike]
        if not all(_equal(*pair, few) for pair in zip(own, others, strict=True)):
            raise Unsuited("the angles of its positions depend on the length of the text")
        return own

    def _watched_pass(self, ids: Tensor, positions: Tensor) -> tuple[Passed, list[Call]]:
        """Return a pass, and what submodules outside of the layers did."""
        calls: list[Call] = []

        def note(module: nn.Module, args: tuple, y: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(y, Tensor):
                calls.append(Call("", module, args[0], y))

        within = {module for layer in self.layers for module in layer.layer.modules()}
        outside = (module for module in decoder_of(self.model).modules() if module not in within)
        hooks = [m.register_forward_hook(note) for m in outside if not any(m.children())]
        try:
            return self._pass_over(ids, positions), calls
        finally:
            for hook in hooks:
                hook.remove()

    @torch.inference_mode()
    def _pass_over(self, ids: Tensor, positions: Tensor) -> Passed:
        """Run the decoder on ids (rows, tokens) at positions, each layer returning its input."""
        inputs: list[Tensor] = []
        angles: list[Angles | None] = []

        def forward_of(layer: FusedLayer) -> LayerForward:
            def forward(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
                inputs.append(hidden_states)
                angles.append(angles_of(args, options))
                return (hidden_states, None) if layer.structure.returns_tuple else hidden_states

            return forward

        # Masks are for layers. For an attention that transformers has no mask for, it makes none.
        asks = attention_is_asked_for(self.model)
        decoder: Any = decoder_of(self.model)
        with (
            patched({layer.layer: forward_of(layer) for layer in self.layers}),
            attention(self.model, decoder, NAME) if asks else nullcontext(),
        ):
            out = decoder(input_ids=ids, position_ids=positions, use_cache=False)
        if not inputs or any(not same_memory(x, inputs[0]) for x in inputs):
            raise Unsuited("something happens between its layers")
        return Passed(inputs[0], angles, out.last_hidden_state)


def tokens_of(model: PreTrainedModel, count: int) -> Tensor:
    """Return a text (1, count) to try a model with."""
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(vocab, (1, count), generator=torch.Generator().manual_seed(0))


def _last_norm(passed: Passed, calls: Sequence[Call]) -> Norm | None:
    """Return the norm behind the last layer, None where there is none."""
    if same_memory(passed.last, passed.x):
        return None
    for call in calls:
        if call.reads(passed.x) and same_memory(call.y, passed.last) and may_be_norm(call.module):
            norm = norm_of(call.module, passed.x.shape[-1])
            if norm is not None:
                return norm
    raise Unsuited("its layers are not followed by a norm that is known")


def _joined(pieces: Sequence[Rotary | None]) -> Rotary | None:
    """Return rotations by consecutive positions as one."""
    rotations = [piece for piece in pieces if piece is not None]
    if not rotations:
        return None
    cos, sin = torch.cat([r.cos for r in rotations]), torch.cat([r.sin for r in rotations])
    return Rotary(cos, sin, interleaved=rotations[0].interleaved)


def _equal(rotary: Rotary | None, other: Rotary | None, positions: Tensor) -> bool:
    """Return whether a rotation at these of its positions is the other."""
    if rotary is None or other is None:
        return rotary is other
    own = torch.cat([rotary.cos[positions], rotary.sin[positions]])
    return torch.equal(own, torch.cat([other.cos, other.sin]))
