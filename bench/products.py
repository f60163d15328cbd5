"""R: the time of the matrix products that a LoRA step cannot avoid, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import nn

from veneer.adapter.parameters import experts_of
from veneer.kernels.cross_entropy import CHUNK_LOGITS
from veneer.models.device import synchronize
from veneer.quant.weight import QuantizedLinear


def replay_seconds(model: nn.Module, tokens: int, labels: int, repeats: int = 3) -> float:
    """Return the median seconds for one step's frozen products at their exact shapes.

    For each linear layer of the blocks W x and, in the backward pass, dy W; for each expert both,
    on its share of the tokens; for the head both, on the labelled rows alone. Nothing is needed of
    attention, norms or the adapters themselves.
    """
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    shapes = [tuple(shape_of(layer)) for layer in layers if layer is not head]
    dtype = head.weight.dtype
    stacks = [*_stacks(model, tokens)]
    widest = max(max(shape) for shape in (*shapes, *(stack.shape[1:] for stack, _ in stacks)))
    device = head.weight.device
    x = torch.randn(tokens, widest, dtype=dtype, device=device)
    chunk = max(1, CHUNK_LOGITS // head.weight.shape[0])
    weights = {s: torch.randn(*s, dtype=dtype, device=device) for s in set(shapes)}
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for out, in_ in shapes:
            weight = weights[out, in_]
            nn.functional.linear(x[:, :in_], weight)
            x[:, :out] @ weight
        for stack, rows in stacks:
            for weight in stack:
                out, in_ = weight.shape
                nn.functional.linear(x[:rows, :in_], weight)
                x[:rows, :out] @ weight
        for first in range(0, labels, chunk):
            rows = min(chunk, labels - first)
            logits = nn.functional.linear(x[:rows, : head.weight.shape[1]], head.weight)
            logits @ head.weight
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def _stacks(model: nn.Module, tokens: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield each stack of experts (experts, out, in), with the rows of each expert."""
    config = model.config.get_text_config()
    for _, module, _ in experts_of(model):
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            if isinstance(stack := getattr(module, name, None), torch.Tensor):
                yield (
                    stack.transpose(1, 2) if module.is_transposed else stack,
                    tokens * config.num_experts_per_tok // len(stack),
                )


def shape_of(layer: nn.Linear | QuantizedLinear) -> torch.Size:
    return (
        layer.quantized_weight.shape if isinstance(layer, QuantizedLinear) else layer.weight.shape
    )
