"""One mixture's experts with adapters, forward and backward: how many times as fast as PEFT, over
each of transformers' implementations, and how far from the products that nobody can avoid (R)?

python -m bench.mixture --tokens 4096 --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import veneer
from veneer.kernels.heap import kept_heap

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
IMPLEMENTATIONS = ("eager", "grouped_mm")  # batched_mm copies a whole expert for each row


class Layer(nn.Module):
    """The experts of one layer, under the name that they have in a model."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        self.experts = Qwen3MoeExperts(config)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = self.experts(x, index, weights)
        return y


def made(config: Qwen3MoeConfig) -> Layer:
    """Return a layer with random weights, the same each time, in bfloat16."""
    torch.manual_seed(0)
    layer = Layer(config).to(torch.bfloat16).requires_grad_(False)
    for weight in layer.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5)
    return layer


def with_peft(config: Qwen3MoeConfig, rank: int) -> nn.Module:
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=STACKS)
    model = get_peft_model(made(config), lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.01)
    return model


def with_veneer(config: Qwen3MoeConfig, rank: int) -> nn.Module:
    patterns = dict.fromkeys([r".*\.gate_up_proj", r".*\.down_proj"], rank)
    lora = veneer.LoRA(rank=rank, alpha=rank, targets=STACKS, rank_pattern=patterns)
    return veneer.attach(made(config), lora, seed=0)


def seconds(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], dy: Tensor) -> float:
    x, index, weights = (t.detach() for t in inputs)
    x.requires_grad_(True)
    weights.requires_grad_(True)
    start = time.perf_counter()
    model(x, index, weights).backward(dy)
    return time.perf_counter() - start


def replay(config: Qwen3MoeConfig, index: Tensor) -> Callable[[], float]:
    """Return what measures the frozen products alone, expert by expert, forward and backward."""
    layer = made(config).experts
    counts = torch.bincount(index.flatten(), minlength=config.num_experts).tolist()
    widest = max(2 * config.moe_intermediate_size, config.hidden_size)
    rows = torch.randn(max(counts), widest, dtype=torch.bfloat16)

    def measured() -> float:
        start = time.perf_counter()
        for weights in (layer.gate_up_proj, layer.down_proj):
            for count, weight in zip(counts, weights, strict=True):
                nn.functional.linear(rows[:count, : weight.shape[1]], weight)
                rows[:count, : weight.shape[0]] @ weight
        return time.perf_counter() - start

    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without PEFT")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    config = Qwen3MoeConfig(
        num_experts=asked.experts,
        num_experts_per_tok=asked.top,
        hidden_size=asked.hidden,
        moe_intermediate_size=asked.inner,
    )
    config._experts_implementation = "eager"
    torch.manual_seed(1)
    x = torch.randn(asked.tokens, asked.hidden).bfloat16()
    chosen, index = torch.randn(asked.tokens, asked.experts).softmax(-1).topk(asked.top)
    inputs = (x, index, (chosen / chosen.sum(-1, keepdim=True)).bfloat16())
    dy = torch.randn_like(x)
    ours = with_veneer(config, asked.rank)
    peft = None if asked.alone else with_peft(config, asked.rank)
    limit = replay(config, index)
    times: dict[str, list[float]] = {}
    with kept_heap():
        for round_ in range(asked.rounds + 1):
            measured = {"R": limit(), "veneer": seconds(ours, inputs, dy)}
            for implementation in IMPLEMENTATIONS if peft is not None else ():
                config._experts_implementation = implementation
                assert peft is not None
                measured[f"PEFT, {implementation}"] = seconds(peft, inputs, dy)
            if round_:  # the first warms up
                for name, each in measured.items():
                    times.setdefault(name, []).append(each)
    print("| | seconds | ÷ R | ÷ Veneer |\n|---|---:|---:|---:|")
    middle = {name: statistics.median(each) for name, each in times.items()}
    for name, each in middle.items():
        print(f"| {name} | {each:.3f} | {each / middle['R']:.2f} | {each / middle['veneer']:.2f} |")


if __name__ == "__main__":
    main()
