"""A mixture of Qwen3-30B-A3B's form with as many blocks as fit into memory in 16 bits, adapters on
everything: Veneer beside PEFT, which makes the change of all experts in each pass.

python -m bench.mixture_in_16_bits --blocks 6
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

import veneer
from bench.engines import RANK, padded
from bench.workloads import random_rows
from veneer.data.encode import Example
from veneer.plan.presets import PRESETS
from veneer.training.events import Step
from veneer.training.memory import begin_measuring, process_memory

ENGINES = ("veneer", "peft")
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERT_RANK = 1
LR = 2e-4


def made(blocks: int) -> PreTrainedModel:
    """Return a model with random weights, the same each time, in bfloat16."""
    settings = PRESETS["qwen3-30b-a3b"] | {"num_hidden_layers": blocks}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**settings, norm_topk_prob=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for weight in model.parameters():  # routers that tell tokens apart
        if weight.ndim == 3:
            weight.data.normal_(std=0.01)
    return model.requires_grad_(False)


def run_veneer(model: PreTrainedModel, rows: list[Example], steps: int) -> Iterator[float]:
    lora = veneer.LoRA(rank=RANK, targets="all", expert_rank=EXPERT_RANK)
    veneer.attach(model, lora, seed=0)
    tokens = len(rows[0].tokens)
    course = veneer.TrainConfig(
        steps=steps, tokens_per_step=tokens, lr=LR, warmup=0, schedule="constant"
    )
    for event in veneer.train(model, rows, course):
        if isinstance(event, Step):
            yield event.seconds


def run_peft(model: PreTrainedModel, rows: list[Example], steps: int) -> Iterator[float]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        target_modules=ATTENTION,
        target_parameters=STACKS,
        rank_pattern=dict.fromkeys(STACKS, EXPERT_RANK),
    )
    adapted = get_peft_model(model, config)
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LR, fused=True)
    adapted.train()
    for row in rows[:steps]:
        start = time.perf_counter()
        adapted(**padded([row])).loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield time.perf_counter() - start


def measure(engine: str, blocks: int, tokens: int, steps: int) -> dict[str, float]:
    """Return seconds of a step, and memory in bytes, of one engine in this process."""
    warnings.simplefilter("ignore")
    model = made(blocks)
    run = {"veneer": run_veneer, "peft": run_peft}[engine]
    rows = random_rows(steps, tokens, 30_000)
    begin_measuring()
    seconds = list(run(model, rows, steps))
    weights = sum(weight.nbytes for weight in model.parameters() if not weight.requires_grad)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return {
        "seconds": statistics.median(seconds[1:]),
        "peak": process_memory("VmHWM"),
        "weights": weights,
        "trained": trained,
    }


def apart(engine: str, blocks: int, tokens: int, steps: int) -> dict[str, float] | None:
    """Return what `measure` does, from a process of its own; None where memory ended."""
    command = [sys.executable, "-m", "bench.mixture_in_16_bits", "--engine", engine]
    command += ["--blocks", str(blocks), "--tokens", str(tokens), "--steps", str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=3, help="the first is not counted")
    parser.add_argument("--engine", choices=ENGINES, help="this one, in this process")
    asked = parser.parse_args()
    if asked.engine:
        print(json.dumps(measure(asked.engine, asked.blocks, asked.tokens[0], asked.steps)))
        return
    print(
        "| tokens a step | engine | tokens/s | seconds a step | weights | peak above them |"
        " trained |"
    )
    print("|---|---|---|---|---|---|---|")
    for tokens in asked.tokens:
        for engine in ENGINES:
            got = apart(engine, asked.blocks, tokens, asked.steps)
            if got is None:
                print(f"| {tokens:,} | {engine} | did not fit | | | | |", flush=True)
                continue
            seconds, above = got["seconds"], (got["peak"] - got["weights"]) / 1e9
            print(
                f"| {tokens:,} | {engine} | {tokens / seconds:.1f} | {seconds:.2f} | "
                f"{got['weights'] / 1e9:.2f} GB | {above:.2f} GB | {got['trained']:,} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
