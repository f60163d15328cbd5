"""How much padding rows have that cannot be packed, and how long their passes take, by the cut.

    python -m bench.padding ROWS.jsonl
    python -m bench.padding ROWS.jsonl --train lfm2 --tokens 2048 --rounds 3

A batch's rows are sorted by length and cut into the runs whose padding, with so many tokens for
each run, is least. The first counts that padding, with words and signs for tokens, so that it needs
no tokenizer. The second takes forward and backward passes of a small hybrid over three batches of
such rows with each cut, in turns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Lfm2Config, MambaConfig, Qwen3_5TextConfig

import veneer
from veneer.data.encode import Example
from veneer.data.packing import StepOrder, pack
from veneer.fused.forward import choose_forward
from veneer.fused.padding import runs_of

BUDGETS = ((512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (4096, 2048), (8192, 2048))
COSTS = (math.inf, 256.0, 128.0, 64.0)
VOCABULARY = 1024
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BLOCK: dict[str, Any] = {"intermediate_size": 1536, "num_attention_heads": 8}
HYBRIDS = {
    "lfm2": lambda: Lfm2Config(
        **COMMON,
        **BLOCK,
        num_hidden_layers=3,
        num_key_value_heads=4,
        layer_types=["conv", "conv", "full_attention"],
    ),
    "qwen3_5": lambda: Qwen3_5TextConfig(
        **COMMON,
        **BLOCK,
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=8,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
    ),
    "mamba": lambda: MambaConfig(**COMMON, num_hidden_layers=2, state_size=16),
}


def texts_in(path: Path) -> list[dict[str, int]]:
    """Return how many words and signs each row has, by field."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{name: len(str(text).split()) for name, text in row.items()} for row in rows]


def counted(lengths: np.ndarray) -> None:
    print(f"{len(lengths)} rows, {lengths.mean():.1f} tokens in the mean, {lengths.max()} at most")
    print("\n| tokens a step, a batch | one pass |", *(f"C = {c:g} |" for c in COSTS[1:]))
    print("|---" * (1 + len(COSTS)) + "|")
    for step, batch in BUDGETS:
        steps = StepOrder(lengths, step, batch, seed=0).epoch(0)
        batches = [lengths[rows].tolist() for each in steps for rows in each]
        cells = []
        for cost in COSTS:
            padding, passes = padding_of(batches, cost)
            many = "" if cost == math.inf else f" in {passes / len(batches):.2f} passes"
            cells.append(f"{padding:.1%}{many}")
        print(f"| {step}, {batch} | {' | '.join(cells)} |", flush=True)


def padding_of(batches: list[list[int]], cost: float) -> tuple[float, int]:
    """Return the padding for each token, and the number of passes."""
    runs = [run for lengths in batches for run in runs_of(lengths, cost)]
    return sum(len(run) * max(run) for run in runs) / sum(map(sum, runs)) - 1, len(runs)


def timed(rows: list[dict[str, int]], name: str, tokens: int, rounds: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HYBRIDS[name]())
    veneer.attach(model, veneer.LoRA(rank=8, targets="all"))
    draw = np.random.default_rng(0)
    examples = []
    for row in rows:
        drawn = draw.integers(3, VOCABULARY, sum(row.values())).tolist()
        prompt = next(iter(row.values()))
        examples.append(Example(drawn, [-100] * prompt + drawn[prompt:], "", 0))
    lengths = np.array([len(example.tokens) for example in examples])
    steps = StepOrder(lengths, tokens, tokens, seed=0).epoch(0)[:3]
    batches = [rows for step in steps for rows in step]
    chosen, _ = choose_forward(model, examples[:4])
    ways = {cost: replace(chosen, pass_tokens=cost) for cost in COSTS}
    seconds: dict[float, list[float]] = {cost: [] for cost in COSTS}
    for number in range(rounds + 1):
        for cost, forward in ways.items():
            begun = time.perf_counter()
            for batch in batches:
                forward(model, pack(examples, batch)).backward()
            model.zero_grad()
            if number:  # the first one warms up
                seconds[cost].append(time.perf_counter() - begun)
    print("| C | passes | padding | seconds | × |\n|---|---:|---:|---:|---:|")
    whole = statistics.median(seconds[math.inf])
    for cost in COSTS:
        padding, passes = padding_of([lengths[batch].tolist() for batch in batches], cost)
        took = statistics.median(seconds[cost])
        print(f"| {cost:g} | {passes} | {padding:.1%} | {took:.2f} | {whole / took:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--train", choices=HYBRIDS, help="time the passes of this model")
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = texts_in(args.rows)
    if args.train:
        timed(rows[::7], args.train, args.tokens, args.rounds)
    else:
        counted(np.array([sum(row.values()) for row in rows]))


if __name__ == "__main__":
    main()
