"""The laws on another device, against float64 on the processor: for `python -m bench.gpu`, on the
first card, and for a test, which tries them on the processor.

Each law raises AssertionError where the device does not keep it. A result may be no further from
the float64 one than that of the plain model on the same device is, times 2 (law 3).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import veneer
from support.closeness import assert_gradients_no_further, assert_no_further
from support.kinds import KINDS, Kind, is_first
from support.plain import Plain, plain_pair
from support.random_adapters import ids, shake
from veneer.adapter.use import use_rows
from veneer.data.packing import pack
from veneer.fused.forward import Forward, choose_forward
from veneer.models.device import CPU

LENGTHS = [17, 5, 30, 12, 5, 24, 2]
SPACE = 1e-2  # what 16 bits may add to a bound, of the reference's length


@dataclass(frozen=True)
class OnDevice(Kind):
    """A kind of adapter whose base is on a device."""

    device: torch.device = CPU

    def base(self, dtype: torch.dtype = torch.float32) -> Any:
        with torch.device(CPU):  # whose random numbers are others than the device's
            base = super().base(dtype)
        return base.to(self.device)

    def inputs(self, rows: int = 2) -> dict[str, Tensor]:
        return {name: x.to(self.device) for name, x in super().inputs(rows).items()}


@dataclass(frozen=True)
class Case:
    """A kind, and the same on the device."""

    kind: Kind
    card: OnDevice

    def copied(self, model: Any) -> Any:
        return copy.deepcopy(model).to(self.card.device)

    @contextmanager
    def peer(self, model: Any, dtype: torch.dtype = torch.float32) -> Iterator[Plain]:
        """Yield the plain model on the device, by formulas and transformers' own forward."""
        with torch.device(self.card.device):
            yield Plain(self.card, model, dtype)


def identity(case: Case) -> None:
    """A fresh adapter changes no bit."""
    for dtype in (torch.float32, torch.bfloat16):
        expected = case.card.says(case.card.base(dtype))
        logits = case.card.says(case.copied(case.kind.fresh(dtype)))
        assert torch.equal(logits[..., : expected.shape[-1]], expected), f"logits in {dtype}"


def gradients(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Packed, padded and one by one: loss and gradients as in float64 on the processor."""
    model = case.kind.shaken(dtype)
    rows, exact = case.kind.rows(LENGTHS), Plain(case.kind, model, torch.float64)
    expected = exact.loss(rows)
    card = case.copied(model)
    with case.peer(card, dtype) as plain:
        loss = plain.loss(rows)
        peer = {"loss": loss.detach().float().cpu(), "gradients": _on_cpu(plain.gradients(loss))}
    chosen, _ = choose_forward(card, rows)
    every = [range(len(rows))]
    ways = [(chosen, every), (chosen, [[i] for i in every[0]])]
    ways += [(Forward(False, chosen.head), every)] * chosen.packed
    exactly = exact.gradients(expected)
    slack = 1e-6 if dtype == torch.float32 else SPACE
    for way, batches in ways:
        ours = torch.stack([way(card, pack(rows, batch)) for batch in batches]).sum()
        trained = {n: w for n, w in card.named_parameters() if w.requires_grad}
        grads = torch.autograd.grad(ours, list(trained.values()))
        assert_no_further(
            ours.detach().cpu(), peer["loss"], expected.detach(), "the loss", slack=slack
        )
        if dtype == torch.float32:
            own = _on_cpu(dict(zip(trained, grads, strict=True)))
            assert_gradients_no_further(own, peer["gradients"], exactly)
        else:
            own = torch.cat([g.detach().flatten().float().cpu() for g in grads])
            theirs, exactly_all = (
                torch.cat([g[name].flatten().double() for name in trained])
                for g in (peer["gradients"], exactly)
            )
            assert_no_further(own, theirs, exactly_all, "all gradients", slack=SPACE)


def gradients_in_bf16(case: Case) -> None:
    """The same in 16 bits, in which a card takes other ways."""
    gradients(case, torch.bfloat16)


def merging(case: Case) -> None:
    """Merged equals unmerged, and without the adapter every bit is the base's."""
    model = case.kind.shaken()
    _, exact = plain_pair(case.kind, model)
    card = case.copied(model)
    merged, own = (case.card.says(each).cpu() for each in (veneer.merge(card), card))
    with torch.no_grad():
        assert_no_further(merged, own, exact.logits(case.kind.inputs()), "logits of the merged")


def mixed_rows(case: Case) -> None:
    """A batch whose rows have adapters of their own equals separate runs."""
    which = ["default", None, "wide", "default", {"default": 0.7, "wide": -0.4}, "wide"]
    model = case.kind.fresh()
    veneer.attach(model, veneer.LoRA(rank=5, targets="all"), name="wide")
    shake(model, size=0.2).requires_grad_(False)
    card, tokens = case.copied(model), ids(len(which), 9)
    alone, exact = [], []
    with torch.no_grad():
        for adapter, row in zip(which, tokens, strict=True):
            for each in (model, card):
                veneer.use(each, adapter)
            plain = Plain(case.kind, model, torch.float64)
            exact.append(plain.logits({"input_ids": row[None]}))
            alone.append(card(row[None].to(card.device), use_cache=False).logits.cpu())
        use_rows(card, which)
        together = card(tokens.to(card.device), use_cache=False).logits.cpu()
    assert_no_further(together, torch.cat(alone), torch.cat(exact), "logits")


LAWS: dict[str, tuple[Callable[[Case], None], Callable[[Kind], bool]]] = {
    "a fresh adapter is an identity": (identity, lambda kind: kind.identity),
    "gradients, packed, padded, alone": (gradients, lambda kind: True),
    "gradients in bf16": (gradients_in_bf16, lambda kind: not kind.beside),
    "merged equals unmerged": (merging, lambda kind: kind.merges),
    "mixed rows": (mixed_rows, lambda kind: kind.mixes_rows and not kind.beside),
}


def kinds_to_try() -> list[Kind]:
    """Return the kinds that can be moved to a device once they are attached; those that differ most
    come first."""
    able = [k for k in KINDS if k.reads_tokens and not (k.peft or k.new_tokens or k.published)]
    return sorted(able, key=lambda kind: (not is_first(kind), kind.replaces_weights))


def broken_laws(kind: Kind, device: torch.device) -> dict[str, str]:
    """Return what each law that suits a kind says on a device, "" where it is kept."""
    case, says = Case(kind, OnDevice(**vars(kind), device=device)), {}
    for law, (check, suits) in LAWS.items():
        if suits(kind):
            try:
                with warnings.catch_warnings(action="ignore", category=veneer.VeneerWarning):
                    check(case)
                says[law] = ""
            except Exception as error:
                says[law] = " ".join(str(error).split()) or type(error).__name__
    return says


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}
