"""What does one pass for several adapters save, beside a pass for each?

    python -m bench.together [--model smollm2-135m] [--tokens 64 500] [--jobs 8] [--rounds 5]

Each adapter learns from rows of its own, other ones in each pass; the ranks are 4, 8, 16 and 64 in
turn. Both ways take the same rows, interleaved, by the same function; times are medians. The
processor's time is given beside the clock's, for where others compute too. `--model` is a built-in
model, which `--bits 4` quantizes, or a shape of bench/shapes.py with random weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

import veneer
from bench.shapes import SHAPES, random_base
from veneer.data.encode import Example
from veneer.data.packing import pack
from veneer.fused.forward import choose_forward
from veneer.fused.together import AdapterBatch, backward_together, why_alone
from veneer.training.begin import let_train

RANKS = (4, 8, 16, 64)
SHORTEST, LONGEST = 20, 100  # tokens of a row
ROWS = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--bits", type=int, default=16, choices=(4, 8, 16))
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 500], help="of each adapter")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    model = base(asked.model, asked.dtype, asked.bits)
    names = [f"job{number}" for number in range(asked.jobs)]
    for number, name in enumerate(names):
        veneer.attach(model, veneer.LoRA(rank=RANKS[number % len(RANKS)]), name=name, seed=number)
    for name in names:
        let_train(model, name)  # attaching one freezes the others
    veneer.use(model, None)
    draw = np.random.default_rng(0)
    rows = [row(draw, model.config.vocab_size) for _ in range(ROWS)]
    forward, notices = choose_forward(model, rows)
    alone = why_alone(forward, model, names, rows)
    print(*notices, *sorted(set(alone.values())), sep="\n")
    model.train()
    print(f"{'tokens':>8} {'together':>20} {'one by one':>20} {'ratio':>12}")
    with forward.installed(model):
        for tokens in asked.tokens:
            measured: dict[str, list[tuple[float, float]]] = {"together": [], "one by one": []}
            for number in range(asked.rounds + 1):  # the first one warms up
                batches = [AdapterBatch(name, *some(draw, rows, tokens)) for name in names]
                for way, apart in (("together", alone), ("one by one", dict.fromkeys(names, ""))):
                    work = partial(backward_together, forward, model, batches, alone=apart)
                    seconds = timed(work)
                    if number:
                        measured[way].append(seconds)
            show(sum(len(each.batch.tokens) for each in batches), measured)


def base(name: str, dtype: str, bits: int) -> Any:
    """Return a built-in model, or one of a shape with random weights."""
    if name in SHAPES:
        assert bits == 16, "a shape is dense"
        return random_base(name, dtype).model
    return veneer.load_base(name, dtype=dtype, bits=bits).model


def row(draw: np.random.Generator, vocab: int) -> Example:
    """Return a row of random tokens whose second half is learnt."""
    tokens = draw.integers(3, vocab, int(draw.integers(SHORTEST, LONGEST))).tolist()
    half = len(tokens) // 2
    return Example(tokens, [-100] * half + tokens[half:], "bench", 0)


def some(draw: np.random.Generator, rows: Sequence[Example], tokens: int) -> tuple[Any, int]:
    """Return a batch of as many rows as `tokens` hold, at least one, and how many have labels."""
    order = draw.permutation(len(rows)).tolist()
    ends = np.cumsum([len(rows[i].tokens) for i in order])
    chosen = order[: max(1, int(np.searchsorted(ends, tokens, side="right")))]
    batch = pack(rows, chosen)
    return batch, int((batch.labels >= 0).sum())


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds that work takes, by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def show(tokens: int, measured: dict[str, list[tuple[float, float]]]) -> None:
    """Print the medians of both ways, and the medians of the rounds' ratios."""
    columns = [
        "{:.2f} s ({:.2f} CPU)".format(*(statistics.median(x) for x in zip(*each, strict=True)))
        for each in measured.values()
    ]
    pairs = zip(*measured.values(), strict=True)
    ratios = [[slow / fast for fast, slow in zip(*pair, strict=True)] for pair in pairs]
    medians = "{:.2f} ({:.2f})".format(*(statistics.median(x) for x in zip(*ratios, strict=True)))
    print(f"{tokens:>8} {columns[0]:>20} {columns[1]:>20} {medians:>12}", flush=True)


if __name__ == "__main__":
    main()
