"""Forward and backward passes of packed batches as CUDA graphs, where few shapes come again.

A pass over a small model is a thousand small kernels, and asking for each takes longer than it
runs. Rows are filled up to one of few numbers of tokens, and what differs between batches of one
size is in tensors: which tokens, which have a label, where rows begin, how many labels the step
has. A pass that needs more of a batch on the host, such as attention over padded groups, cannot be
recorded and goes on being called.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapter.layers import lora_layers
from veneer.adapter.virtual_forward import virtual_tokens_of
from veneer.data.packing import Batch, filled_up
from veneer.fused.forward import Forward
from veneer.fused.inputs import unread_masks
from veneer.kernels.cross_entropy import IGNORED, Labelled
from veneer.kernels.graphs import Graphs, Tensors, length_for
from veneer.kernels.packing import Packing
from veneer.kernels.transfer import sent_together

SIZES = 8  # numbers of tokens up to the largest batch that passes are recorded for
STEP = 64  # of which they are multiples
LEAST_ROWS = 8  # rows of a batch, and the longest of them, are rounded up from these
LEAST_LENGTH = 128


class NotRecordable(Exception):
    """What a pass needs of its batch is not in tensors; the message says what."""


class StartsOfRows(Packing):
    """A packing of which only tensors and bounds say where rows are, for many batches.

    starts (rows + 1,), int32; the last rows may be empty. longest: no row is longer. Raises
    NotRecordable where somebody asks for more.
    """

    def __init__(self, starts: Tensor, *, tokens: int, longest: int) -> None:
        self.starts, self.tokens, self.longest = starts, tokens, longest
        self.sees_own_keys = True

    def __getattr__(self, name: str) -> NoReturn:
        raise NotRecordable(f"its attention takes rows by their lengths ({name})")


@dataclass(frozen=True)
class Sizes:
    """The numbers that a recorded pass is made for: tokens, labelled rows, rows, the longest."""

    tokens: int
    labelled: int
    rows: int
    longest: int

    @classmethod
    def of(cls, batch: Batch, step: int) -> Sizes:
        """Return the sizes that hold a batch, whose tokens are a multiple of `step`."""
        tokens, labelled = len(batch.tokens), int((batch.labels != IGNORED).sum())
        return cls(
            tokens,
            min(tokens, -(-labelled // step) * step),
            length_for(len(batch.lengths), tokens, least=LEAST_ROWS),
            length_for(int(np.max(batch.lengths)), tokens, least=LEAST_LENGTH),
        )


class RecordedPasses:
    """Passes that add their gradients to what `gradients` are.

    tokens_per_batch: of the largest batch that many steps have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Forward,
        gradients: Iterable[Tensor],
        *,
        tokens_per_batch: int,
        graphs: Graphs | None = None,
    ) -> None:
        self.model, self.forward = model, forward
        self.step = max(STEP, -(-tokens_per_batch // SIZES // STEP) * STEP)
        if graphs is None:
            graphs = Graphs.on(model.device, changes=list(gradients))
        self.graphs = graphs
        if graphs.why_not is None:
            graphs.why_not = why_not_recorded(model, forward)

    def __call__(self, batch: Batch, labels: int) -> Tensor:
        """Add the gradient of the batch's loss / labels to the gradients; return the loss, float32.

        labels: of the whole step."""
        if self.graphs.why_not is not None:
            return self._plain(batch, labels)
        batch = filled_up(batch, self.step)
        sizes = Sizes.of(batch, self.step)
        inputs, bounds_of_labels = _inputs(batch, sizes, labels, self.model.device)

        def own(_: Tensors) -> Tensors:
            return {"loss": self._plain(batch, labels)}

        def recorded(tensors: Tensors) -> Tensors:
            loss = self._loss(tensors, sizes, bounds_of_labels)
            (loss * tensors["share"]).backward()
            return {"loss": loss.detach()}

        return self.graphs(sizes, recorded, inputs, own=own)["loss"].clone()

    def notice(self) -> str | None:
        """Return, once, why passes are called as they are."""
        return self.graphs.notice()

    def _plain(self, batch: Batch, labels: int) -> Tensor:
        loss = self.forward(self.model, batch)
        (loss / labels).backward()
        return loss.detach()

    def _loss(self, tensors: Tensors, sizes: Sizes, of_labels: tuple[int, int]) -> Tensor:
        """Return the sum of the losses of labelled rows, of which the last ones are no rows: they
        read zeros, and what zeros cost is taken off again."""
        forward, model = self.forward, self.model
        assert forward.head is not None
        packing = StartsOfRows(tensors["starts"], tokens=sizes.tokens, longest=sizes.longest)
        with (
            unread_masks(model.device),
            forward.installed(model) as installation,
            installation.running(packing),
        ):
            options = {"packing": packing} if installation.attention else {}
            arguments = {"input_ids": tensors["tokens"], "position_ids": tensors["positions"]}
            out = installation.decoder(**arguments, **options, use_cache=False)
            hidden = out.last_hidden_state[0]  # (tokens, dim)
            nothing = hidden.new_zeros(1, hidden.shape[1])
            labelled = Labelled(tensors["rows"], tensors["targets"], *of_labels)
            loss = forward.head.losses(model, torch.cat([hidden, nothing]), labelled).sum()
            first = tensors["rows"].new_zeros(1)
            with torch.no_grad():
                of_nothing = forward.head.losses(model, nothing, Labelled(first, first, 0, 0))
        return loss - tensors["idle"] * of_nothing[0]


def _inputs(
    batch: Batch, sizes: Sizes, labels: int, device: torch.device
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """Return what a recorded pass reads of a batch, and the lowest and highest of its labels."""
    rows = np.flatnonzero(batch.labels != IGNORED)
    targets = batch.labels[rows]
    idle = sizes.labelled - len(rows)
    starts = np.zeros(sizes.rows + 1, dtype=np.int64)
    ends = np.cumsum(batch.lengths)
    starts[1 : len(ends) + 1], starts[len(ends) + 1 :] = ends, ends[-1]
    counts = np.array([idle, labels], dtype=np.int64)
    names = ("tokens", "positions", "rows", "targets", "starts", "counts")
    arrays = (
        *(batch.tokens[None], batch.positions[None]),
        np.append(rows, np.full(idle, sizes.tokens)),  # the row of zeros
        np.append(targets, np.zeros(idle, dtype=np.int64)),
        *(starts, counts),
    )
    inputs = dict(zip(names, sent_together(arrays, device), strict=True))
    inputs["starts"] = inputs["starts"].to(torch.int32)
    idle_rows, step_labels = inputs.pop("counts").float().unbind()
    inputs |= {"idle": idle_rows, "share": 1 / step_labels}
    return inputs, (int(np.min(targets)), int(np.max(targets))) if len(rows) else (0, 0)


def why_not_recorded(model: PreTrainedModel, forward: Forward) -> str | None:
    """Return why passes of a model cannot be recorded, as far as that is known before one is."""
    if not forward.packed or forward.context is not None:
        return "rows are not packed in one process"
    if forward.head is None:
        return "logits are made for all rows"
    head = model.get_output_embeddings()
    if head is None or any(p.requires_grad for p in head.parameters()):
        return "the head trains"
    if virtual_tokens_of(model) is not None:
        return "virtual tokens act"
    if any(p.device != model.device for p in model.parameters()):
        return "its base is streamed"
    if _drops(model):
        return "dropout draws anew in each pass"
    return None


def _drops(model: PreTrainedModel) -> bool:
    drops = any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
    adapters = (adapter for _, layer in lora_layers(model) for adapter, _ in layer.active())
    attention = getattr(model.config.get_text_config(), "attention_dropout", 0.0)
    return drops or bool(attention) or any(adapter.dropout for adapter in adapters)
