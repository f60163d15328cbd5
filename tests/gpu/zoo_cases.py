"""Merging, answers and steps of serving on the pretend GPU, for every causal language model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch

import veneer
from gpu.decoding_cases import _on_card, _ones
from gpu.training_cases import _ALL, _FLOAT32, MIXTURES, base
from support.fake_card import Watch, card, on_card
from support.random_adapters import shake
from veneer.adapter.layers import lora_layers
from veneer.errors import ModelError
from veneer.generate.in_slots import InSlots
from veneer.generate.runners.general import GeneralRunner
from veneer.generate.runners.loaded import LoadedAdapter
from veneer.generate.runners.runner import Chunk, Runner
from veneer.generate.runners.slots import SlotRunner
from veneer.generate.sampling import Sampling
from veneer.generate.slots import NotInSlots, SlotModel
from veneer.kernels.graphs import Graphs
from veneer.kernels.transfer import OnTheWay
from veneer.lowrank.routing import Routing

CONTEXT, SLOTS = 64, 3
# Its code reads the weight of its router, in which rows have no adapters of their own.
OTHER_TARGETS = {"longcat_flash": "o_proj"}
PROMPT = range(3, 15)


def merged(copied: Any, watch: Watch) -> dict[str, Any]:
    """Merge an adapter into a copy of the model, and switch it off and on."""
    with watch.counting() as waits:
        plain = veneer.merge(copied)
        veneer.use(copied, None)
        veneer.use(copied, "default")
    return {"waits": waits, "fits": _on_card(*plain.parameters(), *plain.buffers())}


def stepped(runner: Runner, adapter: LoadedAdapter, watch: Watch) -> dict[str, Any]:
    """Read two prompts, one in two chunks, and decode a row of the base and one of the adapter."""
    logits = []
    with watch.counting() as waits:
        runner.step([Chunk(0, PROMPT, 0, adapter, 1)])
        runner.step([Chunk(1, PROMPT[:6], 0, None, 0)])
        runner.step([Chunk(1, PROMPT[6:], 6, None, 1)])
        for step in range(2):
            rows = ((0, adapter), (1, None))
            token = -1 if isinstance(runner, SlotRunner) else 5
            chunks = [Chunk(s, (token,), 12 + step, a, 1, decoding=True) for s, a in rows]
            logits.append(runner.step(chunks))
    return {"waits": waits, "fits": _on_card(*logits), "shape": [*logits[0].shape][:1]}


def answered(copied: Any, watch: Watch) -> dict[str, Any]:
    """Answer two prompts, whose tokens are read one step late."""
    slots = InSlots(copied, 2, Graphs(None))
    with watch.counting() as waits, mock.patch.object(OnTheWay, "arrived", _ones):
        pieces = [*slots.tokens([[3, 4, 5], [6, 7]], Sampling(max_new_tokens=3), ends={2})]
    return {"waits": waits, "tokens": [len(piece) for piece in pieces]}


def why_not_in_slots(model: Any) -> str:
    """Return why a model is not decoded in slots, which its numbers say, or ""."""
    try:
        SlotModel(model, SLOTS, CONTEXT)
    except NotInSlots as why:
        return str(why)
    return ""


def segments(routing: Routing) -> list[tuple[int, slice]]:
    """Ask for each expert's rows, and give all to the first: what is read says nothing."""
    routing.ends.tolist()
    return [(0, slice(0, len(routing.order)))]


def case(architecture: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Return what waits where; and why nothing is decoded in slots, or served at all."""
    with warnings.catch_warnings(action="ignore"):
        model = base(architecture, dtype)
        targets = OTHER_TARGETS.get(architecture, "all")
        veneer.attach(model, veneer.LoRA(rank=2, targets=targets))
        shake(model, size=0.1).requires_grad_(False).eval()
        if hasattr(model, "generation_config"):
            model.generation_config = type(model.generation_config)()
        refused, why = "", why_not_in_slots(model)
        try:
            GeneralRunner(model, SLOTS)
        except ModelError as error:
            refused = str(error)
    result: dict[str, Any] = {"not in slots": why, "refused": refused}
    with (
        card() as watch,
        mock.patch.object(SlotModel, "_prove"),
        mock.patch.object(GeneralRunner, "_prove"),
        mock.patch.object(Routing, "segments", property(segments)),
    ):
        copied = on_card(model)
        if not refused:
            with torch.no_grad():
                layers = {
                    layer: layer.low_rank_update(layer.named([("default", 1.0)]), dtype)
                    for _, layer in lora_layers(copied)
                }
            adapter = LoadedAdapter("default", layers, 0, ("default",))
            if not why:
                result["answering"] = answered(copied, watch)
                runner: Runner = SlotRunner(copied, SLOTS, CONTEXT, Graphs(None))
            else:
                runner = GeneralRunner(copied, SLOTS)
            veneer.use(copied, None)
            result["serving"] = stepped(runner, adapter, watch)
            veneer.use(copied, "default")
        result["merging"] = merged(copied, watch)
    return result


MODELS = [*dict.fromkeys(architecture for architecture, _, _ in _ALL)]
CASES: dict[str, Callable[[], Any]] = {}
SLOW_CASES: dict[str, Callable[[], Any]] = {each: partial(case, each) for each in MODELS}
SLOW_CASES |= {each: partial(case, each, torch.float32) for each in _FLOAT32}
# In float16, of which no card has grouped products.
IN_FLOAT16 = {f"{each}, float16": partial(case, each, torch.float16) for each in MIXTURES}
SLOW_CASES |= IN_FLOAT16
