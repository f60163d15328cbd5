"""Steps and passes replayed as graphs on a device, for `python -m bench.gpu` and its test.

On a card the graphs are true ones; on a processor `StandIn` plays their part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import veneer
from support.random_adapters import shake
from support.recorders import StandIn
from support.tiny_models import VOCAB, tiny
from veneer.adapter.layers import lora_layers
from veneer.data.encode import Example
from veneer.data.packing import pack
from veneer.fused.forward import choose_forward
from veneer.generate.in_slots import InSlots
from veneer.generate.runners.loaded import LoadedAdapter
from veneer.generate.runners.runner import Chunk
from veneer.generate.runners.slots import SlotRunner
from veneer.generate.sampling import Sampling
from veneer.kernels.graphs import Graphs, is_near
from veneer.training.recorded import RecordedPasses

DTYPE = torch.bfloat16  # which flash attention takes
STEPS = 6  # the first two of a size prove its graph


def broken_graphs(device: torch.device) -> dict[str, str]:
    """Return what was replayed, each with why it is not right, or ""."""
    tries: dict[str, Callable[[torch.device], None]] = {
        "steps of serving, replayed": steps_of_serving,
        "answers, replayed": answers,
        "passes of training, replayed": passes_of_training,
    }
    broken = {}
    for name, attempt in tries.items():
        try:
            attempt(device)
            broken[name] = ""
        except Exception as error:  # whatever a device says
            broken[name] = str(error) or repr(error)
    return broken


def steps_of_serving(device: torch.device) -> None:
    """Rows with adapters of their own give the same logits replayed as called one by one."""
    model = _adapted(device)
    veneer.use(model, None)
    with torch.no_grad():
        layers = {
            layer: layer.low_rank_update(layer.named([("default", 1.0)]), layer.compute_dtype)
            for _, layer in lora_layers(model)
        }
    adapter = LoadedAdapter("default", layers, 0, ("default",))
    graphs = _graphs(device)
    replayed, called = (
        _decoded(SlotRunner(model, 4, 64, g), adapter) for g in (graphs, Graphs(None))
    )
    assert graphs.why_not is None, graphs.why_not
    for number, (ours, own) in enumerate(zip(replayed, called, strict=True)):
        assert is_near(ours.float(), own.float()), f"the logits of step {number} differ"


def answers(device: torch.device) -> None:
    """Greedy answers are the same replayed as called one by one."""
    model = _adapted(device)
    prompts, sampling = [[3, 4, 5], [6, 7, 8, 9]], Sampling(max_new_tokens=STEPS)
    graphs = _graphs(device)
    ours, own = (
        InSlots(model, 2, g).answers(prompts, sampling, ends=()) for g in (graphs, Graphs(None))
    )
    assert graphs.why_not is None, graphs.why_not
    assert ours == own, (ours, own)


def passes_of_training(device: torch.device) -> None:
    """Losses are those of the passes themselves. Where attention takes padded groups, as on a
    processor, nothing can be recorded, and the reason is that."""
    model = _adapted(device)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for lengths in ((9, 14, 30), (20, 21), (5, 6, 7, 8)) * 2:
        rows = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
        batches.append(pack([Example(row, row, "row", 0) for row in rows], range(len(rows))))
    forward, _ = choose_forward(model, [Example(list(range(3, 30)), list(range(3, 30)), "row", 0)])
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    gradients: list[Any] = [weight.grad for weight in trained]
    graphs = _graphs(device, gradients)
    passes = RecordedPasses(model, forward, gradients, tokens_per_batch=64, graphs=graphs)
    for batch in batches:
        ours, own = passes(batch, 10), forward(model, batch).detach()
        assert abs(float(ours - own)) <= 0.01 * float(own), (float(ours), float(own))
    reason = graphs.why_not or ""
    assert not reason or (device.type == "cpu" and "rows by their lengths" in reason), reason


def _adapted(device: torch.device) -> Any:
    model = tiny("llama", dtype=DTYPE)
    return shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all")), size=0.2).to(device)


def _graphs(device: torch.device, changes: list[Any] | None = None) -> Graphs:
    if device.type == "cpu":
        return Graphs(StandIn(), changes=changes or [])
    return Graphs.on(device, changes=changes or [])


@torch.no_grad()
def _decoded(runner: SlotRunner, adapter: LoadedAdapter) -> list[Tensor]:
    """Return the logits of some steps, of which all read the same tokens."""
    rows = [None, adapter, None]
    for slot, own in enumerate(rows):
        runner.step([Chunk(slot, range(3, 9), 0, own, 1)])
    logits = []
    for step in range(STEPS):
        runner.take([0, 1, 2], torch.full((3,), 5 + step, device=runner.newest.device))
        chunks = [
            Chunk(slot, (-1,), 6 + step, own, 1, decoding=True) for slot, own in enumerate(rows)
        ]
        logits.append(runner.step(chunks).clone())
    return logits
