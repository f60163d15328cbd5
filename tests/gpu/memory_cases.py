"""The peak of memory of training steps on the pretend GPU, and what the plan says of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

import veneer
from support.card_memory import CardMemory
from support.fake_card import card, on_card
from veneer.data.encode import Example
from veneer.fused.forward import choose_forward
from veneer.kernels.arena import Arena
from veneer.models.quantize import quantizable, quantize
from veneer.plan.config import PlanConfig
from veneer.plan.find import sizes_of
from veneer.plan.methods import adapted_layers
from veneer.plan.plan import Plan, make_plan
from veneer.quant.weight import QuantizedLinear, QuantizedWeight
from veneer.training import loop

BF16 = torch.bfloat16
LORA = veneer.LoRA(rank=8, targets=("all",))


@dataclass(frozen=True)
class Shape:
    """A model's configuration, and the rows of a pass."""

    config: PretrainedConfig
    rows: int
    length: int


def llama(dim: int, inner: int, heads: int, kv: int, vocab: int, layers: int) -> PretrainedConfig:
    return LlamaConfig(
        hidden_size=dim,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        num_hidden_layers=layers,
        vocab_size=vocab,
        tie_word_embeddings=True,
    )


SHAPES = {
    "small, 4 × 256": Shape(llama(128, 384, 4, 2, 256, 2), 4, 256),
    "SmolLM2-135M, 8 × 256": Shape(llama(576, 1536, 9, 3, 49_152, 2), 8, 256),
    "Llama-3.2-1B, 1 × 2048": Shape(llama(2048, 8192, 32, 8, 128_256, 4), 1, 2048),
    "Qwen3-0.6B, 4 × 1024": Shape(
        Qwen3Config(
            hidden_size=1024,
            intermediate_size=3072,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            num_hidden_layers=4,
            vocab_size=151_936,
            tie_word_embeddings=True,
        ),
        4,
        1024,
    ),
}
METHODS = {
    "lora": PlanConfig(),
    "qlora": PlanConfig(method="qlora"),
    "full": PlanConfig(method="full"),
    "recomputed": PlanConfig(recompute="full"),
    "selective": PlanConfig(recompute="selective"),
    "lora, 8-bit moments": PlanConfig(optimizer="adamw8bit"),
}


def step(shape: Shape, settings: PlanConfig) -> dict[str, Any]:
    """Return the bytes of a run's peak on the card, and those of its plan, amount by amount."""
    torch.manual_seed(0)
    tokens = shape.rows * shape.length
    settings = replace(settings, tokens_per_batch=tokens, max_length=shape.length)
    model = AutoModelForCausalLM.from_config(shape.config, dtype=BF16).requires_grad_(False)
    if settings.base_bits == 4:
        for path, layer in quantizable(model).items():
            model.set_submodule(path, QuantizedLinear(quantize(layer.weight, 4, BF16), layer))
    what = veneer.Method("full") if settings.method == "full" else LORA
    rows = [example(shape.length, n) for n in range(shape.rows)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = veneer.attach(model, what)
        forward, _ = choose_forward(model, rows, recompute=settings.recompute)
    forward = replace(forward, arena=Arena())
    course = veneer.TrainConfig(
        steps=2, lr=1e-3, tokens_per_step=tokens, optimizer=settings.optimizer, warmup=0
    )
    memory = CardMemory()
    with card():
        model, forward = on_card((model, forward))
        memory.note(list(tensors_of(model)))
        chosen = patch.object(loop, "choose_forward", lambda *a, **k: (forward, []))
        with chosen, memory.counting():
            list(veneer.train(model, rows, course))
    plan = planned(shape, settings)
    amounts = {each.name: each.value for each in plan.memory.amounts}
    return {"peak": memory.peak, "lasting": memory.now, "plan": amounts}


def planned(shape: Shape, settings: PlanConfig) -> Plan:
    sizes = sizes_of(shape.config)
    adapted = () if settings.method == "full" else adapted_layers(sizes, LORA)
    return make_plan(settings, sizes, adapted, on_card=True)


def example(length: int, seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 250, (length,), generator=generator).tolist()
    return Example(tokens, tokens, "row", seed)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield all tensors of a model, those of its quantized weights too."""
    for module in value.modules():
        yield from (p for p in module._parameters.values() if p is not None)
        yield from (b for b in module._buffers.values() if b is not None)
        if isinstance(module, QuantizedLinear):
            yield from _inside(module.quantized_weight)


def _inside(value: Any) -> Iterator[Tensor]:
    for entry in vars(value).values():
        if isinstance(entry, Tensor):
            yield entry
        elif isinstance(entry, QuantizedWeight) or hasattr(entry, "absmax"):
            yield from _inside(entry)


def _cases(shapes: list[str], methods: list[str]) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        f"{method}, {shape}": partial(step, SHAPES[shape], METHODS[method])
        for shape in shapes
        for method in methods
    }


FIRST, *PUBLISHED = SHAPES
FIGURES = ["lora", "qlora", "full", "recomputed"]
FAST = ["qlora"]
CASES = _cases([FIRST], FAST)
SLOW_CASES = _cases(PUBLISHED, FIGURES) | _cases([FIRST], [m for m in METHODS if m not in FAST])
