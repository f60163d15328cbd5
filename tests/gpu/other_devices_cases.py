"""Training steps and a pass with a cache on fake tensors of Apple's and Intel's devices."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
from support import fake_card, pretend_gpu, tiny_models
from support.random_adapters import examples, ids
from veneer.data.packing import pack
from veneer.fused.forward import choose_forward
from veneer.kernels import choice
from veneer.kernels.arena import Arena
from veneer.training.optimizer import FlatAdamW

DEVICE = torch.device(os.environ.get(pretend_gpu.DEVICE, "cuda"), 0)
fake_card.CARD = DEVICE
ROWS = examples([7, 19, 12, 5])
LORA = {"rank": 2, "targets": "all"}


class Operations(TorchDispatchMode):
    """Notes which operations compute on the device, and which make float64 there."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.wide: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = pytree.arg_tree_leaves(*args, **(kwargs or {}), result=result)
        there = [x for x in leaves if isinstance(x, Tensor) and x.device.type == DEVICE.type]
        if there:
            self.names.add(func.name())
        if any(x.dtype == torch.float64 for x in there):
            self.wide.add(func.name())
        return result


def plain_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """torch's formula: which function computes attention there, only a true device can say."""
    how = {name: options[name] for name in ("scale", "enable_gqa") if name in options}
    attend = torch.ops.aten._scaled_dot_product_attention_math
    return attend(q, k, v, attn_mask, dropout_p, is_causal, None, **how)[0]


@contextmanager
def device() -> Iterator[Operations]:
    """Let tensors be on the device as fake ones, and yield what notes their operations."""
    with (
        fake_card.card(),
        patch.object(F, "scaled_dot_product_attention", plain_attention),
        patch.object(choice, "device_of", lambda device: choice.Device(device.type)),
        Operations() as operations,
    ):
        yield operations


def step(architecture: str, *, bits: int | None = None, dtype: str = "bfloat16", **lora: Any):
    """Return what a step of training and a pass with a cache compute with on the device."""
    kind = getattr(torch, dtype)
    if bits:
        model = tiny_models.quantized(architecture, bits, dtype=kind)
    else:
        model = tiny_models.tiny(architecture, dtype=kind)
    with warnings.catch_warnings(action="ignore"):
        veneer.attach(model, veneer.LoRA(**LORA, **lora))
        forward, _ = choose_forward(model, ROWS)
    with device() as operations:
        object.__setattr__(forward, "arena", Arena())
        model, forward = fake_card.on_card((model, forward))
        weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
        optimizer = FlatAdamW(weights, lr=1e-3, weight_decay=0.0)
        with forward.installed(model):
            optimizer.begin()
            loss = forward(model, pack(ROWS, range(len(ROWS)))) / 7
            loss.backward()
            optimizer.step(lr=1e-3, clip=1.0)
        with torch.no_grad():
            first = model.eval()(input_ids=ids().to(DEVICE), use_cache=True)
            model(input_ids=ids(2, 1).to(DEVICE), past_key_values=first.past_key_values)
        devices = {str(weight.device) for weight in model.parameters()}
        devices |= {
            str(weight.grad.device) for weight in weights.values() if weight.grad is not None
        }
    return {
        "packed": forward.packed,
        "fused": len(forward.layers),
        "devices": sorted(devices),
        "float64": sorted(operations.wide),
        "operations": sorted(operations.names),
    }


STEPS = {
    "llama": partial(step, "llama"),
    "llama, float32": partial(step, "llama", dtype="float32"),
    "llama, float16": partial(step, "llama", dtype="float16"),
    "gemma2, float16": partial(step, "gemma2", dtype="float16", dora=True),
    "qwen3, 4 bits, float16": partial(step, "qwen3", bits=4, dtype="float16"),
    "llama, dora": partial(step, "llama", dora=True, dropout=0.1),
    "qwen3, 4 bits": partial(step, "qwen3", bits=4),
    "gemma2, 8 bits": partial(step, "gemma2", bits=8),
    "gpt2": partial(step, "gpt2"),
    "gpt_oss": partial(step, "gpt_oss"),
}
