"""Do loss and gradients agree with PEFT's? Asked before anything is timed.

Both are compared with PEFT in the next wider dtype. In float32 we must be within 1e-5 of it, in
bfloat16 no further from it than PEFT is.

python -m bench.agreement --dtype float32
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor

import veneer
from bench.engines import ALPHA, RANK, padded, peft_model
from bench.workloads import workload
from veneer.adapter.layers import lora_layers
from veneer.cli.console import quieten_libraries
from veneer.data.packing import pack
from veneer.fused.forward import choose_forward

BATCHES, ROWS = 3, 4
FLOAT32_LIMIT = 1e-5  # relative distance, in the mean over loss and all gradients


def ours(model, examples, factors, recompute: str) -> dict[str, Tensor]:
    """Return the loss and every adapter gradient as Veneer computes them."""
    veneer.attach(model, veneer.LoRA(rank=RANK, alpha=ALPHA, targets="all"), seed=0)
    for path, layer in lora_layers(model):
        adapter = layer.adapters["default"]
        for name in ("lora_A", "lora_B"):
            getattr(adapter, name).data.copy_(factors(path, name, getattr(adapter, name)))
    forward, notices = choose_forward(model, examples, recompute=recompute)
    assert not notices, notices
    batch = pack(examples, range(len(examples)))
    loss = forward(model, batch) / int((batch.labels >= 0).sum())
    loss.backward()
    results = {"loss": loss.detach()}
    for path, layer in lora_layers(model):
        for name in ("lora_A", "lora_B"):
            results[f"{path}.{name}"] = getattr(layer.adapters["default"], name).grad
    return results


def theirs(model, examples, factors) -> dict[str, Tensor]:
    """Return the same as PEFT and transformers compute it, from padded rows."""
    model = peft_model(model)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    for path, module in layers.items():
        for name in ("lora_A", "lora_B"):
            weight = getattr(module, name)["default"].weight
            weight.data.copy_(factors(path, name, weight))
    loss = model(**padded(examples)).loss
    loss.backward()
    results = {"loss": loss.detach()}
    for path, module in layers.items():
        for name in ("lora_A", "lora_B"):
            results[f"{path}.{name}"] = getattr(module, name)["default"].weight.grad
    return results


def factors(path: str, name: str, like: Tensor) -> Tensor:
    """Return the same random A or B for everybody."""
    seed = sum(map(ord, f"{path}.{name}"))
    return 0.02 * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def distances(results: dict[str, Tensor], reference: dict[str, Tensor]) -> list[float]:
    assert results.keys() == reference.keys()
    return [
        float(
            torch.dist(results[name].double(), reference[name].double())
            / reference[name].double().norm()
        )
        for name in reference
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", default="sft", choices=("dense", "sft"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bf16"))
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    asked = parser.parse_args()
    quieten_libraries()

    loaded = veneer.load_base(asked.model, dtype=asked.dtype)

    def model(dtype: torch.dtype):
        return copy.deepcopy(loaded.model).to(dtype)

    dtype = loaded.model.dtype
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    work = workload(asked.workload, loaded.tokenizer, steps=BATCHES, data=None)
    errors: dict[str, list[float]] = {"veneer": [], "peft": []}
    for step in work.steps:
        examples = [work.examples[i] for i in step[:ROWS]]
        reference = theirs(model(wider), examples, factors)
        mine = ours(model(dtype), examples, factors, asked.recompute)
        errors["veneer"].append(distances(mine, reference))
        errors["peft"].append(distances(theirs(model(dtype), examples, factors), reference))
    means = {
        engine: _mean([x for batch in batches for x in batch]) for engine, batches in errors.items()
    }
    limit = FLOAT32_LIMIT if dtype == torch.float32 else means["peft"]
    print(f"| {asked.dtype}, against PEFT in {wider} | mean | largest | loss |")
    print("|---|---|---|---|")
    for engine, batches in errors.items():
        largest, loss = max(map(max, batches)), _mean([batch[0] for batch in batches])
        print(f"| {engine} | {means[engine]:.2e} | {largest:.2e} | {loss:.2e} |")
    agrees = means["veneer"] <= limit
    print(f"\nAllowed in the mean: {limit:.2e}. {'Within' if agrees else 'Beyond'}.")
    raise SystemExit(not agrees)


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


if __name__ == "__main__":
    main()
