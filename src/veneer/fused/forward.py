"""The loss of a packed batch, by the fastest way that provably equals the model's own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from veneer.adapter.parameters import experts_of
from veneer.adapter.virtual_forward import virtual_input_count, virtual_tokens_of
from veneer.adapter.wrapper import unwrapped
from veneer.data.encode import Example
from veneer.data.packing import Batch, filled_up, pack, sharing_prompts
from veneer.fused.dealt import RotaryOfAll, length_dependent_rotaries, refuse_undealt
from veneer.fused.head import Head, described, own_logits_and_head
from veneer.fused.inputs import PassInputs, unread_masks
from veneer.fused.layers import FusedLayer
from veneer.fused.padding import PASS_TOKENS, in_runs, pass_tokens_of, runs_of
from veneer.fused.patches import (
    ExpertsForward,
    FusedForward,
    Installation,
    LayerForward,
    RecomputedForward,
    patched,
)
from veneer.fused.recognise import TOLERANCE, recognise
from veneer.fused.recompute import Recompute
from veneer.fused.shared_prompts import notices_of, why_not_shared
from veneer.fused.slower_ways import slower_ways
from veneer.fused.watch import attention_is_asked_for
from veneer.kernels.arena import Arena
from veneer.kernels.attention import NAME, packed_attention
from veneer.kernels.cross_entropy import From, TokenLoss, losses_of
from veneer.kernels.dealt_packing import DealtPacking
from veneer.kernels.disk_arena import IS_AVAILABLE, DiskArena
from veneer.kernels.shared_packing import packing_of
from veneer.kernels.wide import wide
from veneer.models.blocks import decoder_layers, decoder_of
from veneer.models.evaluating import evaluating
from veneer.models.sharded import is_shared
from veneer.processes.context import ContextGroup
from veneer.quant.weight import kept_weight

PROBE_LENGTHS = (7, 19, 12)
# Of mixtures, which may be larger than the memory: each token more makes a pass read more experts.
MIXTURE_PROBE_LENGTHS, MIXTURE_PROBE_STEP = (3, 7, 4), 16
# How far the hidden state of a token may be from what it is behind other rows, relatively: what
# state-space layers leak from one packed row into the next reached 0.2 to 1.
FAR = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
# Packed batches are filled up to a multiple of this many tokens: matrix products are prepared for
# each new shape, which costs about as much as forty tokens for a 135M model.
TOKENS_STEP = 64


@dataclass(frozen=True)
class Forward:
    """How a model's loss is computed.

    packed: rows end to end, without padding; head: what makes the logits of labelled rows alone, or
    None where the model makes those of all rows; layers: those that are computed as two functions;
    recompute: what the backward pass computes again; alone: rows one by one, where not even padding
    is possible; experts: modules whose routed experts are computed as one function; tokens_step:
    packed batches are filled up to a multiple of it, in each process; pass_tokens: others are cut
    into passes of rows of like length, one more where it saves so many tokens of padding; context:
    the processes that share each batch's tokens, None where this one computes them all; shares:
    rows of one prompt that follow each other read its keys and values, computed once; unshared: why
    they do not.
    """

    packed: bool
    head: Head | None
    layers: tuple[FusedLayer, ...] = ()
    unfused: Mapping[str, str] = field(default_factory=dict)
    recompute: Recompute = "none"
    alone: bool = False
    experts: tuple[nn.Module, ...] = ()
    tokens_step: int = TOKENS_STEP
    pass_tokens: float = PASS_TOKENS
    context: ContextGroup | None = None
    shares: bool = False
    unshared: str | None = None
    arena: Arena = field(default_factory=Arena, compare=False)
    _installations: dict[nn.Module, Installation] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return the sum of the label tokens' losses, a float32 scalar with a gradient."""
        return self.losses(model, batch).sum()

    def losses(
        self, model: PreTrainedModel, batch: Batch, token_loss: TokenLoss | None = None
    ) -> Tensor:
        """Return −log p of each label token in the batch's order, or its token_loss, (labelled,),
        in float32 and with a gradient: with a `context`, of this process's label tokens.

        A call outside of `installed` patches the model for itself.
        """
        device = model.device
        if self.packed:
            batch = sharing_prompts(batch) if self.shares else batch
            step = self.tokens_step * (1 if self.context is None else self.context.size)
            batch = filled_up(batch, step, virtual_input_count(model))
        tokens, labels, positions = batch.tokens, batch.labels, batch.positions
        lengths = batch.lengths.tolist()
        undealt = self.packed and self.context is None
        packing = packing_of(lengths, batch.before, device) if undealt else None
        if self.context is not None:
            packing = dealt = DealtPacking(
                lengths, self.context, device, highest=int(np.max(positions))
            )
            tokens, labels, positions = (x[dealt.own.numpy()] for x in (tokens, labels, positions))
        send = partial(PassInputs.sent, device=device)
        with (
            unread_masks(device),
            self.installed(model) as installation,
            installation.running(packing),
        ):
            if packing is not None:
                arguments = {"input_ids": tokens[None], "position_ids": positions[None]}
                options = {"packing": packing} if installation.attention else {}
                return self._losses(installation, send(arguments, labels), token_loss, **options)
            runs = [[n] for n in lengths] if self.alone else runs_of(lengths, self.pass_tokens)
            inputs = [
                send(arguments, own_labels, places=places)
                for arguments, own_labels, places in in_runs(tokens, labels, runs)
            ]
            firsts = accumulate((len(each.labels.targets) for each in inputs), initial=0)
            offset = (token_loss and From(token_loss, first) for first in firsts)
            return torch.cat([*map(partial(self._losses, installation), inputs, offset)])

    def exchanges(self, model: PreTrainedModel) -> bool:
        """Return whether a pass of this process waits for those of others."""
        return self.context is not None or is_shared(model)

    @contextmanager
    def installed(self, model: PreTrainedModel) -> Iterator[Installation]:
        """Patch the layers of `model` once, for all calls until the context ends.

        Calls of the model by anybody else take its own forward meanwhile. May be nested.
        """
        if model in self._installations:
            yield self._installations[model]
            return
        asks = attention_is_asked_for(model)
        installation = Installation.of(model, NAME if self.packed and asks else None)
        recompute_projections = self.recompute == "selective"
        forwards: dict[nn.Module, LayerForward] = {}
        if self.packed:
            for fused in self.layers:
                forwards[fused.layer] = FusedForward(
                    installation,
                    fused,
                    self.arena,
                    recompute_projections=recompute_projections,
                )
        for module in self.experts:
            installation.experts[module] = ExpertsForward(
                installation, module, self.arena, recompute_projections=recompute_projections
            )
        if self.recompute == "full" or (self.recompute == "none" and installation.checkpointed):
            for layer in decoder_layers(model) or ():
                original = forwards.get(layer, layer.forward)
                forwards[layer] = RecomputedForward(installation, original)
        if self.context is not None:
            for module in length_dependent_rotaries(model):
                forwards[module] = RotaryOfAll(installation, module.forward)
        self._installations[model] = installation
        try:
            with patched(forwards):
                yield installation
        finally:
            del self._installations[model]

    def _losses(
        self,
        installation: Installation,
        inputs: PassInputs,
        token_loss: TokenLoss | None = None,
        **options: Any,
    ) -> Tensor:
        model, labels = installation.model, inputs.labels
        options |= {"use_cache": False, **inputs.arguments}
        if self.head is not None:
            hidden = installation.decoder(**options).last_hidden_state  # (rows, tokens, dim)
            return self.head.losses(model, hidden.flatten(0, 1), labels, token_loss)
        return losses_of(model(**options).logits.flatten(0, 1), labels, token_loss)


def choose_forward(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    recompute: Recompute = "none",
    directory: Path | None = None,
    context: ContextGroup | None = None,
    answer_one_prompt: bool = False,
) -> tuple[Forward, list[str]]:
    """Return the fastest Forward that gives this model's own loss, and what there is to know
    of it: what did not suit it, and how many tokens pairs have to compute.

    directory: where `recompute="disk"` keeps what a pass keeps; the system's for such files unless
    given. context: the processes that share each batch's tokens; all of them choose at once.
    answer_one_prompt: rows that follow each other in a batch do, as those of a pair.

    The proof compares a few short rows with the same rows computed by the model alone, one by one.
    Raises ConfigError where tokens cannot be shared.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    answer_one_prompt |= bool(examples[0].second)
    # Not in training mode, in which dropout would make any two passes differ.
    with torch.no_grad(), evaluating(model):
        routed = {module: why for _, module, why in experts_of(model)}
        experts = tuple(module for module, why in routed.items() if why is None)
        lengths = MIXTURE_PROBE_LENGTHS if routed else PROBE_LENGTHS
        step = MIXTURE_PROBE_STEP if routed else TOKENS_STEP
        rows = [
            Example(tokens, tokens, "probe", 0)
            for row, length in zip(_cycle(examples), lengths, strict=False)
            if len(tokens := row.tokens[:length]) > 1
        ]
        # The first row's pass serves two proofs: a mapped base is read from disk at each pass.
        first = torch.tensor([rows[0].tokens], device=model.device)
        own, head, why_not_head = own_logits_and_head(model, first)
        losses = [_sum_of_losses(own, first[0])]
        losses += [_own_loss(model, row) for row in rows[1:]]
        expected = sum(map(float, losses))
        last = torch.tensor([rows[-1].tokens], device=model.device)
        recognised = recognise(model, last)
        layers = tuple(it for it in recognised.values() if isinstance(it, FusedLayer))
        unfused = {path: it for path, it in recognised.items() if isinstance(it, str)}

        def why_not(layers: tuple[FusedLayer, ...]) -> str | None:
            forward = Forward(True, head, layers, experts=experts, tokens_step=step)
            return _why_not_packed(model, layers) or _why_not(forward, model, rows, expected)

        why_not_packed = why_not(layers)
        if why_not_packed and layers:
            unfused |= {path: why_not_packed for path in recognised if path not in unfused}
            layers = ()
            why_not_packed = why_not(layers)
        all_fused = sum(layer.applies() for layer in layers) == len(decoder_layers(model) or [None])
        why_not_shares: str | None = "rows are not packed"
        if answer_one_prompt and not why_not_packed and context is None:
            packed = Forward(True, head, layers, experts=experts, tokens_step=step)
            losses_of_batch = partial(packed.losses, model)
            tokens, tolerance = rows[-1].tokens, _tolerance(model)
            why_not_shares = why_not_shared(model, losses_of_batch, tokens, tolerance=tolerance)
        with_padding = Forward(False, head, experts=experts)
        why_not_padded = why_not_packed and _why_not(with_padding, model, rows, expected)
        if context is not None:
            cut = replace(context, least=1)  # rows as short as these too
            dealt = Forward(True, head, layers, experts=experts, tokens_step=step, context=cut)
            refuse_undealt(
                model,
                context,
                why_not_packed=why_not_packed,
                loss=lambda: dealt(model, pack(rows, range(len(rows)))),
                own=expected,
                tolerance=_tolerance(model),
            )
    notices = []
    if why_not_padded:
        notices.append(
            f"Rows are computed one by one, since neither packing nor padding suits this model: "
            f"packed, {why_not_packed}; padded, {why_not_padded}"
        )
    elif why_not_packed:
        notices.append(f"Rows are padded, since packing does not suit this model: {why_not_packed}")
    if why_not_head:
        notices.append(
            f"Logits are made for all rows, since labelled ones alone do not suit this model: "
            f"{why_not_head}"
        )
    if answer_one_prompt:
        notices += notices_of(examples, why_not_shares)
    notices += slower_ways(model, routed)
    blocks = decoder_layers(model)
    on_disk = recompute == "disk"
    suits = all_fused
    if on_disk:  # where what autograd keeps of a mixture is not
        suits &= model.device.type == "cpu" and IS_AVAILABLE
        suits &= all(layer.structure.mixture is None for layer in layers)
    if recompute in ("selective", "disk") and not suits:
        recompute = "full"
        what = "Keeping activations on the disk" if on_disk else "Selective recomputation"
        notices.append(f"{what} does not suit this model; its layers are computed whole again.")
    if recompute == "full" and blocks is None:
        recompute = "none"
        notices.append("The layers of this model are not known; nothing is computed again.")
    chosen = Forward(
        *(not why_not_packed, head, layers, unfused, recompute),
        alone=bool(why_not_padded),
        experts=experts,
        pass_tokens=pass_tokens_of(model, has_experts=bool(routed)),
        context=context,
        shares=answer_one_prompt and not why_not_shares,
        unshared=why_not_shares if answer_one_prompt else None,
        arena=DiskArena(_existing(directory)) if recompute == "disk" else Arena(),
    )
    return chosen, notices


def _existing(directory: Path | None) -> Path:
    """Return the nearest of a directory and those above it that exists."""
    place = Path(tempfile.gettempdir()) if directory is None else directory.absolute()
    return next(above for above in (place, *place.parents) if above.is_dir())


def _why_not_packed(model: PreTrainedModel, layers: Sequence[FusedLayer]) -> str | None:
    """Return why rows cannot be packed, where attention is not ours in layers of the model's own
    code; or None."""
    if attention_is_asked_for(model):
        return None
    if virtual_tokens_of(model) is not None:
        return "virtual tokens do not reach its attention"
    if len(layers) < len(decoder_layers(model) or [None]):
        return "its code attends in a way of its own"
    return None


def _cycle(examples: Sequence[Example]) -> Iterator[Example]:
    while True:
        yield from examples


def _why_not(
    forward: Forward, model: PreTrainedModel, rows: Sequence[Example], own: float
) -> str | None:
    """Return why a way does not give the model's own loss of the rows, or None.

    A loss summed over all rows may hide what leaks from one packed row to the next; two orders of
    the rows do not. The same functions compute both, so that rounding is nearly the same.
    """
    order = range(len(rows))
    try:
        with _hidden_states(model) as outputs:
            loss = float(forward(model, pack(rows, order)))
            if not abs(loss - own) <= _tolerance(model) * abs(own):
                return f"its loss of {loss:.6g} differs from the model's own {own:.6g}"
            if forward.packed:
                forward(model, pack(rows, order[::-1]))
    except Exception as error:  # whatever a foreign architecture raises, the slower way is open
        return described(error)
    return _why_apart(outputs, [len(row.tokens) for row in rows]) if len(outputs) == 2 else None


def _tolerance(model: PreTrainedModel) -> float:
    """Return how far apart, of themselves, two ways' losses may be: by the dtype of logits."""
    return TOLERANCE[kept_weight(unwrapped(model.get_output_embeddings())).dtype]


def _why_apart(outputs: Sequence[Tensor], lengths: Sequence[int]) -> str | None:
    """Return why a packed row depends on the rows before it, or None. outputs: hidden states of the
    rows in their order and in reverse, (1, tokens, dim)."""
    one, other = (wide(x[0, : sum(lengths)]) for x in outputs)  # (tokens, dim)
    other = torch.cat(other.split(list(lengths[::-1]))[::-1])
    distance = float(((other - one).norm(dim=-1) / one.norm(dim=-1)).max())
    if distance <= FAR[outputs[0].dtype]:
        return None
    return f"a token is {distance:.2g} from what it is behind other rows"


@contextmanager
def _hidden_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Yield a list to which each pass through the decoder adds its output, (rows, tokens, dim)."""
    outputs: list[Tensor] = []

    def note(decoder: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(hidden := getattr(output, "last_hidden_state", None), Tensor):
            outputs.append(hidden)

    hook = decoder_of(model).register_forward_hook(note)
    try:
        yield outputs
    finally:
        hook.remove()


def _own_loss(model: PreTrainedModel, row: Example) -> Tensor:
    tokens = torch.tensor([row.tokens], device=model.device)
    return _sum_of_losses(model(input_ids=tokens, use_cache=False).logits[0], tokens[0])


def _sum_of_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the loss of a row's tokens behind the first, by the logits (tokens, vocab) of all."""
    return F.cross_entropy(logits[:-1].float(), tokens[1:], reduction="sum")
