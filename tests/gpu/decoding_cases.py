"""Serving, generation and merging on the pretend GPU: what of it waits for the card."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread
from typing import Any
from unittest import mock

import torch

import veneer
from support.fake_card import CARD, Watch, card, on_card
from support.random_adapters import shake
from support.serving_bases import PROMPT, base_of
from support.tiny_models import VOCAB, quantized, tiny
from veneer.adapter.layers import lora_layers
from veneer.adapter.own_rows import OwnRows
from veneer.adapter.parameters import experts_of
from veneer.generate.in_slots import InSlots
from veneer.generate.runners.loaded import LoadedAdapter
from veneer.generate.runners.runner import Chunk
from veneer.generate.runners.slots import SlotRunner
from veneer.generate.sampling import Sampling
from veneer.generate.slots import SlotModel
from veneer.kernels.graphs import Graphs
from veneer.kernels.transfer import OnTheWay
from veneer.quant.weight import QuantizedLinear
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.request import Adjustments, EngineConfig, Request
from veneer.serve.engine.sampler import Drawn, Sampler

ARCHITECTURES = ("mistral", "gpt2", "qwen3", "gpt_neox", "phi3", "gemma2", "gemma3")
KINDS: dict[str, Any] = {
    "lora": {"rank": 2, "targets": "all"},
    "dora": {"rank": 3, "targets": "all", "dora": True},
}
PENALIZED = Adjustments(0.5, 0.5, 1.2, ((7, 1.0),), 0.05)
SMALL = EngineConfig(slots=3, chunk=16)
GREEDY, DRAWN = Sampling(), Sampling(temperature=0.8, top_k=20, top_p=0.9)


@contextmanager
def served(architecture: str) -> Iterator[tuple[Watch, SlotRunner, list[LoadedAdapter | None]]]:
    """Yield a runner on the card, and adapters that its rows may have, the base alone too."""
    model = tiny(architecture)
    for name, options in KINDS.items():
        if options.get("dora") and any(experts_of(model)):  # there is no DoRA of experts
            options = {**options, "targets": "attention"}
        veneer.attach(model, veneer.LoRA(**options), name=name)
    shake(model, size=0.1).requires_grad_(False)
    veneer.use(model, None)
    with card() as watch, mock.patch.object(SlotModel, "_prove"):
        copied = on_card(model)
        adapters: list[LoadedAdapter | None] = [None]
        with torch.no_grad():
            for name in KINDS:
                layers = {
                    layer: layer.low_rank_update(layer.named([(name, 1.0)]), layer.compute_dtype)
                    for _, layer in lora_layers(copied)
                    if layer.named([(name, 1.0)])
                }
                own = own_rows() if name == "lora" else None
                adapters.append(LoadedAdapter(name, layers, 0, (name,), own=own))
        yield watch, SlotRunner(copied, 4, 64, Graphs(None)), adapters


def own_rows() -> OwnRows:
    """Return rows of two new tokens, on the card."""
    ids, rows = torch.arange(VOCAB, VOCAB + 2, device=CARD), torch.ones(2, 32, device=CARD)
    places = torch.zeros(VOCAB + 2, dtype=torch.long, device=CARD)
    return OwnRows(VOCAB, VOCAB + 2, places, rows, ids, rows)


def _on_card(*tensors: torch.Tensor) -> bool:
    return all(tensor.device == CARD for tensor in tensors)


def _sampled(
    runner: SlotRunner, logits: torch.Tensor, slots: Sequence[int], sampling: Sampling
) -> tuple[Drawn, bool]:
    samplers = [Sampler(sampling, None, 2 if slot == 1 else None) for slot in slots]
    if sampling is DRAWN:
        samplers[-1].adjustments, samplers[-1].prompt = PENALIZED, range(3, 9)
    drawn = Drawn(logits, samplers)
    runner.take(slots, drawn.ids)
    return drawn, _on_card(logits, drawn.ids) and logits.dtype == torch.float32


def prefill(architecture: str) -> Callable[[], dict]:
    def case() -> dict:
        with served(architecture) as (watch, runner, adapters), watch.counting() as waits:
            fits = []
            for slot, adapter in enumerate(adapters):
                logits = runner.step([Chunk(slot, range(3, 15), 0, adapter, 0)])
                logits = runner.step([Chunk(slot, range(3, 9), 12, adapter, 1)])
                fits.append(_sampled(runner, logits, [slot], GREEDY)[1])
            block = runner.block(0, 0, 16)
            runner.fill(3, [block])
        return {"waits": waits, "fits": all(fits) and _on_card(block)}

    return case


def decoding(architecture: str, sampling: Sampling) -> Callable[[], dict]:
    """Three rows, each with an adapter of its own, and a prompt beside them."""

    def case() -> dict:
        with served(architecture) as (watch, runner, adapters):
            for slot, adapter in enumerate(adapters):
                runner.step([Chunk(slot, range(3, 15), 0, adapter, 1)])
            with watch.counting() as waits:
                fits, drawn = [], []
                for step in range(3):
                    chunks = [
                        Chunk(slot, (-1,), 12 + step, adapter, 1, decoding=True)
                        for slot, adapter in enumerate(adapters)
                    ]
                    chunks.append(Chunk(3, range(3, 7), 4 * step, None, 1))
                    logits = runner.step(chunks)
                    each, fit = _sampled(runner, logits, range(4), sampling)
                    drawn.append(each)
                    fits.append(fit)
            with watch.counting() as reading, mock.patch.object(OnTheWay, "arrived", _ones):
                tokens = [each.tokens() for each in drawn]
        return {
            "waits": waits,
            "reading": reading,
            "fits": all(fits),
            "tokens": [len(each) for each in tokens],
            "tops": [len(each[1].top) for each in tokens],
        }

    return case


def _ones(self: OnTheWay) -> list[torch.Tensor]:
    """Stand in for tensors that have come, which have no numbers here."""
    return [torch.ones(tensor.shape, dtype=tensor.dtype) for tensor in self._host]


def engine_of(architecture: str) -> Callable[[], dict]:
    """The engine's own steps: prompts in chunks, a cached prefix, answers, and scores of a text."""

    def case() -> dict:
        base = base_of(architecture)
        requests = [
            Request((*PROMPT, 5, 6), sampling=Sampling(max_new_tokens=3), logprobs=2),
            Request((*PROMPT, 7), sampling=Sampling(max_new_tokens=3, temperature=0.0)),
            Request(PROMPT, prompt_logprobs=True, logprobs=2),
        ]
        with (
            card() as watch,
            mock.patch.object(SlotModel, "_prove"),
            mock.patch.object(Thread, "start"),  # this thread makes the steps
            mock.patch.object(OnTheWay, "arrived", _ones),
        ):
            engine = Engine(replace(base, model=on_card(base.model)), config=SMALL)
            engine.runner.graphs = Graphs(None)
            streams = [engine.submit(request) for request in requests]
            steps = 0
            with watch.counting() as waits:
                while engine._active or engine._ready:
                    engine._admit()
                    engine._step(list(engine._active))
                    steps += 1
        answers = [stream.result() for stream in streams]
        return {
            "waits": waits,
            "steps": steps,
            "tokens": [len(answer.tokens) for answer in answers],
            "scores": len(answers[2].prompt_logprobs),
            "tops": [len(top) for top in answers[2].prompt_top[:2]],
            "errors": [repr(answer.error) for answer in answers if answer.error],
        }

    return case


def waiting_again() -> dict:
    """A step whose small matrix is sent as it was before, and one whose tokens are read at once."""

    def sent_slowly(values: Any, device: torch.device) -> torch.Tensor:
        return torch.as_tensor(values).to(device)

    with served("llama") as (watch, runner, _):
        chunk = Chunk(0, (-1,), 5, None, 1, decoding=True)
        with (
            watch.counting() as sending,
            mock.patch("veneer.generate.runners.slots.sent", sent_slowly),
        ):
            logits = runner.step([chunk])
        with watch.counting() as reading:
            logits.argmax(-1).tolist()
    return {"sending": sending, "reading": reading}


def merging(kind: str, bits: int | None) -> Callable[[], dict]:
    """Merging, and switching adapters off and on."""

    def case() -> dict:
        dtype = torch.bfloat16
        model = (
            tiny("llama", dtype=dtype) if bits is None else quantized("llama", bits, dtype=dtype)
        )
        veneer.attach(model, veneer.LoRA(**KINDS[kind]))
        with card() as watch:
            copied = on_card(shake(model, size=0.1))
            for module in copied.modules():
                if isinstance(module, QuantizedLinear) and module.quantized_weight.device != CARD:
                    module.quantized_weight = module.quantized_weight.to(CARD)
            with watch.counting() as waits:
                plain = veneer.merge(copied)
                veneer.use(copied, None)
                veneer.use(copied, "default")
        tensors = [*plain.parameters(), *plain.buffers()]
        dtypes = {str(p.dtype) for p in plain.parameters()}
        return {"waits": waits, "fits": _on_card(*tensors), "dtypes": sorted(dtypes)}

    return case


def generating(sampling: Sampling) -> Callable[[], dict]:
    """Answers of a model with an adapter; the tokens are read one step late."""

    def case() -> dict:
        model = tiny("mistral")  # whose layers have windows
        veneer.attach(model, veneer.LoRA(**KINDS["dora"]))
        pieces: list[list[int]] = []
        with card() as watch, mock.patch.object(SlotModel, "_prove"):
            copied = on_card(shake(model, size=0.1))
            slots = InSlots(copied, 3, Graphs(None))
            with watch.counting() as waits, mock.patch.object(OnTheWay, "arrived", _ones):
                prompts = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
                pieces += slots.tokens(prompts, sampling, ends={2})
        return {"waits": waits, "pieces": pieces}

    return case


CASES = {
    "decoding, llama, drawn": decoding("llama", DRAWN),
    "engine, llama": engine_of("llama"),
    "waiting again": waiting_again,
    "merging, dora": merging("dora", None),
    "generating": generating(Sampling(max_new_tokens=3)),
}
SLOW_CASES = {
    **{f"prefill, {name}": prefill(name) for name in ARCHITECTURES},
    **{f"decoding, {name}": decoding(name, GREEDY) for name in ARCHITECTURES},
    "engine, gpt2": engine_of("gpt2"),
    "merging, lora, NF4": merging("lora", 4),
    "generating, drawn": generating(Sampling(max_new_tokens=3, temperature=0.7, top_p=0.9)),
}
