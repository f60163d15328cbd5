"""What does a step cost whatever is in it? Thirty layers with hardly any numbers in them.

python -m bench.fixed_cost
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import veneer
from bench.engines import ALPHA, CLIP, LR, RANK
from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import pack
from veneer.fused.forward import Forward, choose_forward
from veneer.kernels import native
from veneer.training.optimizer import FlatAdamW

ROWS, TOKENS, WARM_UP = 8, 64, 10
NARROW = LlamaConfig(
    vocab_size=512,
    hidden_size=72,
    intermediate_size=96,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=8,
    tie_word_embeddings=True,
)
PARTS = ("forward", "backward", "optimizer")


@dataclass
class Steps:
    """Steps of one row each, and the processor's time that each part of them took."""

    model: torch.nn.Module
    examples: list[Example]
    optimizer: FlatAdamW
    forward: Forward
    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def loss(self, number: int) -> Tensor:
        batch = pack(self.examples, [number % ROWS])
        self.optimizer.begin()
        return self.forward(self.model, batch) / (TOKENS - 1)

    def run(self, count: int) -> None:
        for number in range(count):
            marks = [time.process_time()]
            loss = self.loss(number)
            marks.append(time.process_time())
            loss.backward()
            marks.append(time.process_time())
            self.optimizer.step(lr=LR, clip=CLIP)
            marks.append(time.process_time())
            for part, begin, end in zip(PARTS, marks, marks[1:], strict=False):
                self.seconds[part].append(end - begin)


def steps() -> Steps:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(NARROW, dtype=torch.bfloat16).requires_grad_(False)
    rows = np.random.default_rng(0).integers(5, NARROW.vocab_size, (ROWS, TOKENS)).tolist()
    examples = [Example(row, [UNLABELLED, *row[1:]], "random", 0) for row in rows]
    veneer.attach(model, veneer.LoRA(rank=RANK, alpha=ALPHA, targets="all"), seed=0)
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    optimizer = FlatAdamW(weights, lr=LR, weight_decay=0.0)
    forward, notices = choose_forward(model.train(), examples)
    assert not notices, notices
    assert len(forward.layers) == NARROW.num_hidden_layers, forward.unfused
    return Steps(model, examples, optimizer, forward)


def operations(run: Callable[[], object]) -> Counter[str]:
    """Return how often each of torch's operations is called, those that others call included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    return Counter(
        {event.key: event.count for event in profiler.key_averages() if "::" in event.key}
    )


def python_calls(run: Callable[[], object]) -> tuple[int, int]:
    """Return the number of calls from Python, and of those the calls of compiled kernels."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    stats = pstats.Stats(profiler)
    kernels = sum(
        calls
        for (file, _, name), (_, calls, *_) in stats.stats.items()  # type: ignore[attr-defined]
        if file == native.__file__ and name == "call"
    )
    return stats.total_calls, kernels  # type: ignore[attr-defined]


def nodes(loss: Tensor) -> Counter[str]:
    """Return how many autograd nodes of each kind a loss has."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return Counter(node.name() for node in seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--profile", help="print Python's profile, sorted by this")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    measured = steps()
    with measured.forward.installed(measured.model):
        measured.run(WARM_UP + asked.steps)
        times = {part: sorted(each[WARM_UP:]) for part, each in measured.seconds.items()}
        if asked.profile:
            profiler = cProfile.Profile()
            profiler.runcall(measured.run, 10)
            pstats.Stats(profiler).sort_stats(asked.profile).print_stats(60)
        loss = measured.loss(0)
        kinds = nodes(loss)
        ways: dict[str, Callable[[], object]] = {
            "forward": lambda: measured.loss(0),
            "backward": loss.backward,
        }
        counts = {part: operations(way) for part, way in ways.items()}
        loss = measured.loss(0)
        ways["backward"] = loss.backward
        calls = {part: python_calls(way) for part, way in ways.items()}
    print("| | median | fastest tenth | torch's operations | calls of kernels | Python's calls |")
    print("|---|---:|---:|---:|---:|---:|")
    for part in ("forward", "backward"):
        own = times[part]
        ms = [f"{1e3 * own[len(own) // share]:.1f} ms" for share in (2, 10)]
        numbers = [sum(counts[part].values()), calls[part][1], calls[part][0]]
        print("|", " | ".join([part, *ms, *map(str, numbers)]), "|")
    for title, each in {**counts, "autograd's nodes": kinds}.items():
        print(f"\n{title}:", ", ".join(f"{name} {count}" for name, count in each.most_common(16)))


if __name__ == "__main__":
    main()
