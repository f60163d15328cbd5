"""How long does a conversation wait where adapters take over from the base, and give back to it?

    python -m bench.activated [--model smollm2-135m] [--context 4000] [--rounds 3]

The base answers over a long context, an adapter looks at all of it, and the base goes on: with an
adapter that acts from an invocation on, and with a plain one of the same rank, interleaved. Each
conversation has a context of its own, so that nothing is cached of another.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import veneer
from veneer.generate.sampling import Sampling
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.library import Library
from veneer.serve.engine.request import EngineConfig, Request

RANK = 8
NEW = 16  # tokens of each answer
INVOCATION = "<|im_start|>assistant\n"
TURNS = ("base", "adapter", "base again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--context", type=int, default=4000, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    base = veneer.load_base(asked.model, dtype=asked.dtype)
    invocation = tuple(base.tokenizer(INVOCATION, add_special_tokens=False)["input_ids"])
    with tempfile.TemporaryDirectory() as home:
        places = {
            "activated": write(base, Path(home) / "activated", invocation),
            "plain": write(base, Path(home) / "plain", None),
        }
        config = EngineConfig(slots=2, cache_bytes=2**33)
        with Engine(base, Library(places), config) as engine:
            for name in places:
                engine.load(name)
                conversation(engine, name, invocation, 64, seed=-1)  # warms up
            seconds: dict[str, list[list[float]]] = {name: [] for name in places}
            for number in range(asked.rounds):
                for name, of_rounds in seconds.items():
                    turns = conversation(engine, name, invocation, asked.context, seed=number)
                    of_rounds.append(turns)
    table(seconds)


def write(base: veneer.Base, place: Path, invocation: tuple[int, ...] | None) -> Path:
    """Write an adapter over all linear layers whose values are random."""
    config = veneer.LoRA(rank=RANK, targets="all", invocation=invocation)
    veneer.attach(base.model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in base.model.parameters():
            if weight.requires_grad:
                weight.copy_(0.01 * torch.randn(weight.shape, generator=generator))
    veneer.save(base.model, place)
    veneer.detach(base.model)
    return place


def conversation(
    engine: Engine, adapter: str, invocation: tuple[int, ...], context: int, *, seed: int
) -> list[float]:
    """Return the seconds to the first token of each turn."""
    vocabulary = len(engine.tokenizer)
    # A context of its own for each adapter and round.
    generator = torch.Generator().manual_seed(1000 * (seed + 1) + len(adapter))
    tokens = torch.randint(100, vocabulary, (context,), generator=generator).tolist()
    seconds = []
    for which in (None, adapter, None):
        tokens += invocation
        first, answer = first_token(engine, tokens, which)
        seconds.append(first)
        tokens += answer
    return seconds


def first_token(engine: Engine, tokens: list[int], which: str | None) -> tuple[float, list[int]]:
    """Return the seconds to the first token, and the tokens of the answer."""
    began = time.perf_counter()
    request = Request(tuple(tokens), which, Sampling(max_new_tokens=NEW), special=True)
    first, answer = 0.0, []
    for piece in engine.submit(request):
        if piece.tokens and not first:
            first = time.perf_counter() - began
        answer += [token.id for token in piece.tokens]
        if piece.error is not None:
            raise piece.error
    return first, answer


def table(seconds: dict[str, list[list[float]]]) -> None:
    """Print the median of each turn, and how they compare."""
    medians = {
        name: [statistics.median(turn) for turn in zip(*of_rounds, strict=True)]
        for name, of_rounds in seconds.items()
    }
    print(
        "| first token of | activated, ms | plain, ms | activated / plain |\n|---|---:|---:|---:|"
    )
    for number, turn in enumerate(TURNS):
        ours, plain = (1e3 * medians[name][number] for name in ("activated", "plain"))
        print(f"| {turn} | {ours:,.0f} | {plain:,.0f} | {ours / plain:.3f} |")


if __name__ == "__main__":
    main()
