r"""Several jobs over one base, trained together, one after another, and one after another by PEFT.

python -m bench.many --data e2e/train.jsonl --jobs 8 --model smollm2-135m
python -m bench.many --data rows.jsonl --mapped 40 --tokens 64 --steps 1 --recompute full \
    --ranks 4 --targets q_proj v_proj --dtype float32 --alone 2 --ways "together,one after another"

Each job has a rank of its own (4 to 64, or --ranks) on all linear layers (or --targets), rows of
its own, and the same number of steps. What is timed begins with the first step and ends with the
last, of each run; each way runs in a process of its own, one after another, as often as --rounds
says. The processor's time is given beside the clock's, for where others compute too.

--mapped: so many layers of a 13B model's shape, of 40, random and in NF4, in files that are written
to --place and deleted; each way has a third of their size as its memory, page cache and all (root
on Linux, for a control group). Fewer layers than all have beside it what Python and torch take.
Adapters of 8 jobs with ranks to 64 on all layers, and their moments, are larger than that third.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig

import veneer
from bench.engines import padded
from bench.limit import drop_caches, limited
from bench.random_base import write_random_base
from bench.shapes import LEAST_VOCAB, SHAPES, random_base
from veneer.data.encode import Example
from veneer.data.load import load_examples
from veneer.models.load import load_config_and_tokenizer
from veneer.training.events import Event, Started, Step
from veneer.training.memory import begin_measuring, process_memory

WAYS = ("together", "one after another", "peft")
RANKS = (4, 8, 16, 32, 64, 8, 16, 4)
LR = 2e-4
WHOLE = 40  # layers of a 13B model
PROGRAM = 700_000_000  # bytes of Python and torch, more than a third of a few layers
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock:
    """Tokens of steps, and the seconds from the first step's beginning to the last one's end, by
    the clock and of the processor."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self.processor = 0, 0.0, 0.0
        self._begun = 0.0, 0.0

    def take(self, event: Event) -> None:
        """Count an event of a run, or of one of several that go on at a time."""
        if isinstance(event, Started):
            self.begin()
        elif isinstance(event, Step):
            self.end(event.tokens)
            self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self._begun = time.perf_counter(), time.process_time()

    def end(self, tokens: int) -> None:
        """End a step of so many tokens."""
        self.tokens += tokens
        self.seconds += time.perf_counter() - self._begun[0]
        self.processor += time.process_time() - self._begun[1]


def course(asked: argparse.Namespace, job: int) -> veneer.TrainConfig:
    return veneer.TrainConfig(
        steps=asked.steps,
        tokens_per_step=asked.tokens,
        lr=LR,
        warmup=0,
        schedule="constant",
        seed=job,
        recompute=asked.recompute,
    )


def rank(asked: argparse.Namespace, job: int) -> int:
    return asked.ranks[job % len(asked.ranks)]


def lora(asked: argparse.Namespace, job: int) -> veneer.LoRA:
    return veneer.LoRA(rank=rank(asked, job), targets=asked.targets)


def together(base: veneer.Base, rows: Sequence[list[Example]], asked: argparse.Namespace) -> Clock:
    jobs = {}
    for number, own in enumerate(rows):
        veneer.attach(base.model, lora(asked, number), name=f"job-{number}", seed=number)
        jobs[f"job-{number}"] = veneer.Job(own, course(asked, number))
    clock = Clock()
    for _, event in veneer.train_many(base.model, jobs, tokens_per_pass=asked.tokens_per_pass):
        clock.take(event)
    return clock


def one_after_another(
    base: veneer.Base, rows: Sequence[list[Example]], asked: argparse.Namespace
) -> Clock:
    clock = Clock()
    for number, own in enumerate(rows):
        veneer.attach(base.model, lora(asked, number), seed=number)
        for event in veneer.train(base.model, own, course(asked, number)):
            clock.take(event)
        veneer.detach(base.model)
    return clock


def peft(base: veneer.Base, rows: Sequence[list[Example]], asked: argparse.Namespace) -> Clock:
    """The same rows in the same steps, padded."""
    from peft import LoraConfig, get_peft_model

    clock, model = Clock(), base.model
    for number, own in enumerate(rows):
        config = LoraConfig(r=rank(asked, number), target_modules=list(asked.targets))
        adapted = get_peft_model(model, config)
        weights = [weight for weight in adapted.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0, fused=True)
        adapted.train()
        for step in steps_of(own, asked):
            clock.begin()
            adapted(**padded(step)).loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clock.end(sum(len(row.tokens) for row in step))
        model = adapted.unload()
    return clock


def steps_of(rows: Sequence[Example], asked: argparse.Namespace) -> Iterator[list[Example]]:
    """Yield rows of about `--tokens` tokens, neighbours in length, as Veneer's steps have them."""
    from veneer.data.columns import lengths_of
    from veneer.data.packing import StepOrder

    order = StepOrder(lengths_of(rows), asked.tokens, 4096, 0, 0).epoch(0)
    for number in range(asked.steps):
        yield [rows[i] for batch in order[number] for i in batch]


def base_of(asked: argparse.Namespace) -> veneer.Base:
    if asked.mapped:
        _, tokenizer = load_config_and_tokenizer("smollm2-135m")
        return veneer.load_base(asked.place, dtype=asked.dtype, tokenizer=tokenizer)
    if asked.model in SHAPES:
        return random_base(asked.model, asked.dtype)
    return veneer.load_base(asked.model, dtype=asked.dtype)


def write_mapped(place: Path, layers: int) -> int:
    """Write layers of a 13B model's shape, with the vocabulary of the tokenizer, and return their
    bytes."""
    config = LlamaConfig(
        vocab_size=LEAST_VOCAB,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=layers,
        num_attention_heads=40,
        tie_word_embeddings=False,
    )
    return write_random_base(place, config, pack_ends=True)


def measure(asked: argparse.Namespace) -> dict[str, float]:
    """Return tokens/s, by the clock and of the processor, and bytes of one way, in this process."""
    warnings.simplefilter("ignore")
    base = base_of(asked)
    examples, _ = load_examples(asked.data, base.tokenizer)
    rows = [examples[number :: asked.jobs] for number in range(asked.jobs)]
    if asked.way != "together":
        rows = rows[: asked.alone]
    weights = sum(weight.nbytes for weight in base.model.parameters())
    begin_measuring()
    way = {"together": together, "one after another": one_after_another, "peft": peft}[asked.way]
    clock = way(base, rows, asked)
    return {
        "tokens": clock.tokens / clock.seconds,
        "of processor": clock.tokens / clock.processor,
        "above": process_memory("VmHWM") - weights,
    }


def apart(way: str, argv: Sequence[str], enter: Callable[[], None] | None) -> dict[str, float]:
    """Return what `measure` does, from a process of its own, which `enter`s a control group."""
    command = [sys.executable, "-m", "bench.many", *argv, "--way", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=enter)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--alone", type=int, help="jobs that train one after another; all if not")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=500, help="of a step of a job")
    parser.add_argument("--tokens-per-pass", type=int, default=4096)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="the jobs', in turn")
    parser.add_argument("--targets", nargs="+", default=LINEAR)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "float32"))
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--mapped", type=int, default=0, metavar="LAYERS")
    parser.add_argument("--place", type=Path, default=Path("/tmp/veneer-many"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--way", choices=WAYS, help="this one, in this process")
    asked = parser.parse_args()
    if asked.way:
        print(json.dumps(measure(asked)))
        return
    results: dict[str, list[dict[str, float]]] = {}
    what = asked.model
    with ExitStack() as stack:
        enter = None
        if asked.mapped:
            stack.callback(shutil.rmtree, asked.place, ignore_errors=True)
            size = write_mapped(asked.place, asked.mapped)
            limit = size // 3 + (PROGRAM if asked.mapped < WHOLE else 0)
            what = f"{asked.mapped} layers of a 13B shape in NF4 ({size / 1e9:.2f} GB) in at most "
            what += f"{limit / 1e9:.2f} GB"
            enter, _ = stack.enter_context(limited(limit))
        for _ in range(asked.rounds):
            for way in asked.ways.split(","):
                if asked.mapped:
                    drop_caches()
                results.setdefault(way, []).append(apart(way, sys.argv[1:], enter))
    print(f"{what}, {asked.dtype}, {asked.jobs} jobs, {asked.tokens} tokens a step\n")
    print("| | tokens/s | first is | per second of the processor | first is | peak above weights |")
    print("|---|---:|---:|---:|---:|---:|")
    of_first: dict[str, float] = {}  # the first way's rates
    for way, runs in results.items():
        cells = []
        for clock in ("tokens", "of processor"):
            rate = statistics.median(run[clock] for run in runs)
            shown = f"{rate:,.{0 if rate >= 10 else 2}f}"
            cells += [shown, f"{of_first.setdefault(clock, rate) / rate:.2f} x"]
        above = max(run["above"] for run in runs) / 1e9
        print(f"| {way} | {' | '.join(cells)} | {above:.2f} GB |")


if __name__ == "__main__":
    main()
