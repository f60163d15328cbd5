"""What do prefix blocks in files save after a restart, and what do they cost other rows?

    python -m bench.prefix_files [--model smollm2-135m] [--tokens 2000] [--rounds 5]

The time to the first token of a long prompt: computed, from memory, and from files with an engine
that has just been started. Then the times between the tokens of another answer while such a prompt
arrives: one that is computed, one that is read. Each round has a prompt of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

import veneer
from veneer.generate.sampling import Sampling
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.request import EngineConfig, Request

ANSWER = 200  # tokens of the answer that others must not delay


def first_token(engine: Engine, prompt: tuple[int, ...]) -> float:
    """Return the seconds to the first token."""
    began = time.perf_counter()
    engine.submit(Request(prompt, sampling=Sampling(max_new_tokens=1))).result()
    return time.perf_counter() - began


def longest_gap(engine: Engine, prompt: tuple[int, ...]) -> float:
    """Return the longest time between two tokens of a short answer, in the middle of which a
    prompt arrives."""
    sampling = Sampling(max_new_tokens=ANSWER)
    stream = engine.submit(Request((1, *prompt[:8]), sampling=sampling, logprobs=0))
    times, other = [], None
    for piece in stream:
        times += [time.perf_counter()] * bool(piece.tokens)
        if len(times) == ANSWER // 4 and other is None:
            other = engine.submit(Request(prompt, sampling=Sampling(max_new_tokens=1)))
    if other is not None:
        other.result()
    return max(b - a for a, b in pairwise(times[ANSWER // 8 :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    base = veneer.load_base(options.model, dtype="bf16")
    generator = torch.Generator().manual_seed(0)
    shape = (2 * options.rounds, options.tokens)
    prompts = [tuple(p) for p in torch.randint(100, 9000, shape, generator=generator).tolist()]
    with tempfile.TemporaryDirectory() as place:
        config = EngineConfig(slots=2, cache_directory=Path(place))
        with Engine(base, config=config) as engine:
            first_token(engine, prompts[0][::-1])
            computed = [first_token(engine, prompt) for prompt in prompts]
            memory = [first_token(engine, prompt) for prompt in prompts]
        with Engine(base, config=config) as engine:
            files = [first_token(engine, prompt) for prompt in prompts[: options.rounds]]
            reading = [longest_gap(engine, prompt) for prompt in prompts[options.rounds :]]
            new = [longest_gap(engine, prompt[::-1]) for prompt in prompts[options.rounds :]]
            alone = [longest_gap(engine, prompt[:9]) for prompt in prompts]
        block = next(Path(place).rglob("*.kvblock")).stat().st_size
    print(f"first token of {options.tokens:,} tokens, median of {options.rounds}:")
    for what, times in (("computed", computed), ("memory", memory), ("files", files)):
        print(f"  {what:9} {1000 * median(times):8.1f} ms")
    print("longest time between two tokens of another answer:")
    for what, times in (("alone", alone), ("a prompt is read", reading), ("computed", new)):
        print(f"  {what:17} {1000 * median(times):8.1f} ms")
    print(f"{block / config.chunk / 1e3:.1f} kB a token in files")


if __name__ == "__main__":
    main()
