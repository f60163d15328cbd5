"""What do many adapters over one base cost, and how fast is one answer? Beside PEFT's
`adapter_names`, transformers' `generate` and, with --vllm, vLLM in the environment that
`make proof-vllm` sets up, interleaved in one run."""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import veneer
from bench.engines import ALPHA, LINEAR, RANK
from bench.shapes import SHAPES, random_base
from veneer.formats.convert import convert
from veneer.generate.runners.compiled import CompiledRunner
from veneer.generate.runners.loaded import LoadedAdapter
from veneer.generate.runners.runner import Chunk
from veneer.generate.runners.slots import SlotRunner
from veneer.generate.sampling import Sampling
from veneer.kernels.heap import kept_heap
from veneer.models.description import keeps_experts
from veneer.serve.engine.admission import mix_of
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.library import Library
from veneer.serve.engine.request import EngineConfig, Request
from veneer.serve.engine.sampler import Drawn, Sampler, sample

ROWS, PROMPT, PREFIX = 16, 32, 1000
SHORT = 8  # tokens of a prompt beside vLLM, which gathers an A and a B for each of them
STORY = "Once upon a time, in a small village by the sea, there lived"
WARM_UPS = 2
PAUSE = 0.05  # seconds in which the threads of the program before go to sleep
Timed = Callable[[], float]  # milliseconds of one round


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m", help="or a shape of bench/shapes.py")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--bits", type=int, choices=(4, 8))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="steps in a round")
    parser.add_argument("--new", type=int, default=64, help="tokens of a single answer")
    parser.add_argument("--resident", type=int, default=1000)
    parser.add_argument("--vllm", action="store_true", help="beside vLLM, and nothing else")
    asked = parser.parse_args()
    if asked.model in SHAPES:
        base = random_base(asked.model, asked.dtype)
    else:
        base = veneer.load_base(asked.model, dtype=asked.dtype, bits=asked.bits)
    theirs = copy.deepcopy(base.model)
    with tempfile.TemporaryDirectory() as home, kept_heap(), torch.inference_mode():
        places = write_adapters(base.model, Path(home))
        names = [f"adapter-{n}" for n in range(max(asked.resident, ROWS))]
        library = Library({name: places[n % ROWS] for n, name in enumerate(names)})
        config = EngineConfig(slots=ROWS, adapter_bytes=2**40)
        engine = Engine(base, library, config)
        for notice in engine.notices:
            print(notice)
        few = [ready(engine, name) for name in names[:ROWS]]
        if asked.vllm:
            beside_vllm(engine, theirs, base.tokenizer, few, places, Path(home), asked)
            engine.close()
            return
        print("| decoding | ms | |\n|---|---:|---|")
        batches(engine, theirs, few, asked.rounds, asked.steps)
        many_adapters(engine, few, names, asked.rounds, asked.steps)
        print("\n| one answer | ms | |\n|---|---:|---|")
        single(engine, theirs, asked.rounds, asked.new)
        first_token(engine, asked.rounds)
        engine.close()


def batches(engine: Engine, theirs: Any, few: list[LoadedAdapter], rounds: int, steps: int) -> None:
    """16 rows of the base, 16 rows with an adapter each, and the same in PEFT."""
    times = interleaved(
        {
            "base": decoding(engine, [None] * ROWS, steps),
            "mixed": decoding(engine, few, steps),
            "transformers": plain_decoding(theirs, None, steps),
        },
        rounds,
    )
    base, mixed = times["base"], times["mixed"]
    row(f"{ROWS} rows, base alone", base)
    row(f"{ROWS} rows, {ROWS} adapters", mixed, f"{mixed / base:.2f} × base alone")
    row(f"{ROWS} rows, transformers, base alone", times["transformers"])
    if any(keeps_experts(module) for module in theirs.modules()):
        return  # PEFT's adapter_names cannot name adapters of experts
    peft = interleaved(
        {
            "peft": plain_decoding(*with_peft(theirs), steps),
            "mixed": decoding(engine, few, steps),
        },
        rounds,
    )
    ratio = peft["peft"] / peft["mixed"]
    row(f"{ROWS} rows, {ROWS} adapters, PEFT's adapter_names", peft["peft"], f"{ratio:.1f} × ours")


def beside_vllm(
    engine: Engine,
    model: Any,
    tokenizer: Any,
    few: list[LoadedAdapter],
    places: list[Path],
    home: Path,
    asked: argparse.Namespace,
) -> None:
    """16 rows with an adapter each in vLLM, over the same base and adapters, on the same cores."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from support.vllm import Vllm

    veneer.write_model(model, tokenizer, home / "base")
    vllm = Vllm(
        home / "base",
        home / "vllm.log",
        threads=torch.get_num_threads(),
        dtype={"bf16": "bfloat16", "fp32": "float32"}.get(asked.dtype, asked.dtype),
        max_loras=ROWS,
        max_lora_rank=RANK,
        max_num_seqs=ROWS,
    )
    for n, place in enumerate(places):
        convert(place, home / f"peft-{n}", to="peft")
        if refused := vllm.load(f"a{n}", home / f"peft-{n}"):
            raise RuntimeError(refused)
    rows: dict[str, list[str | None]] = {
        "mixed": [f"a{n}" for n in range(ROWS)],
        "base": [None] * ROWS,
    }
    prompt = tokenizer(STORY)["input_ids"][:SHORT]
    tokens: dict[str, list[list[int]]] = {}

    def in_vllm(which: str) -> float:
        time.sleep(PAUSE)
        rows_of = [(name, prompt) for name in rows[which]]
        spent, tokens[f"{which} there"] = vllm.decode(rows_of, steps=asked.steps)
        return spent

    def here(which: str, adapters: list[Any]) -> float:
        time.sleep(PAUSE)
        spent, tokens[f"{which} here"] = greedy(engine, adapters, prompt, asked.steps)
        return spent

    timed = {}
    for which, adapters in (("mixed", few), ("base", [None] * ROWS)):
        timed[f"{which} here"] = partial(here, which, adapters)
        timed[f"{which} there"] = partial(in_vllm, which)
    times = interleaved(timed, asked.rounds)
    print(f"| decoding, a step of {ROWS} rows | Veneer | vLLM {vllm.version} | tokens/s | |")
    print("|---|---:|---:|---:|---|")
    for which, what in (("base", "base alone"), ("mixed", f"{ROWS} adapters")):
        ours, other = times[f"{which} here"], times[f"{which} there"]
        pairs = list(zip(tokens[f"{which} here"], tokens[f"{which} there"], strict=True))
        same = sum(first_difference(a, b) for a, b in pairs)
        whole = sum(min(len(a), len(b)) for a, b in pairs)
        speeds = " and ".join(f"{ROWS * 1e3 / spent:.0f}" for spent in (ours, other))
        beside = f"{other / ours:.2f} × as fast; the first {same} of {whole} tokens are the same"
        print(f"| {what} | {ours:.2f} | {other:.2f} | {speeds} | {beside} |", flush=True)
    vllm.close()


def first_difference(a: list[int], b: list[int]) -> int:
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def greedy(
    engine: Engine, adapters: list[Any], prompt: list[int], steps: int
) -> tuple[float, list[list[int]]]:
    """Return the milliseconds of a step that gives every row a token, and all tokens."""
    choose, runner = [Sampler(Sampling())] * len(adapters), engine.runner
    tokens: list[list[int]] = []
    for slot, adapter in enumerate(adapters):
        logits = runner.step([Chunk(slot, prompt, 0, adapter, 1)])
        tokens.append([token.id for token in sample(logits, choose[:1])])
    slots, late = list(range(len(adapters))), isinstance(runner, SlotRunner)
    if isinstance(runner, SlotRunner):  # the newest tokens are on the device
        newest = [own[-1] for own in tokens]
        runner.take(slots, torch.tensor(newest, device=runner.newest.device))
    under_way: deque[Drawn] = deque()
    start = time.perf_counter()
    for at in range(steps):
        chunks = [
            Chunk(slot, (tokens[slot][-1],), len(prompt) + at, adapter, 1, decoding=True)
            for slot, adapter in enumerate(adapters)
        ]
        under_way.append(Drawn(runner.step(chunks), choose))
        if isinstance(runner, SlotRunner):
            runner.take(slots, under_way[-1].ids)
        while len(under_way) > (late and at + 1 < steps):  # one step late, as the engine reads
            for slot, token in enumerate(under_way.popleft().tokens()):
                tokens[slot].append(token.id)
    spent = (time.perf_counter() - start) * 1e3 / steps
    for slot in range(len(adapters)):
        runner.free(slot)
    return spent, tokens


def many_adapters(
    engine: Engine, few: list[LoadedAdapter], names: list[str], rounds: int, steps: int
) -> None:
    """The same with many adapters in memory, of which each round takes others; and a swap."""
    many = [ready(engine, name) for name in names]
    turns = iter(range(10**6))

    def others() -> float:
        at = next(turns) * ROWS % (len(many) - ROWS + 1)
        return decoding(engine, many[at : at + ROWS], steps)()

    times = interleaved({"few": decoding(engine, few, steps), "many": others}, rounds)
    ratio = times["many"] / times["few"]
    gigabytes = engine.stats.resident_bytes / 2**30
    row(
        f"{ROWS} of {len(many):,} adapters in memory ({gigabytes:.1f} GB), others each round",
        times["many"],
        f"{ratio:.2f} × the same {ROWS}",
    )
    swaps = []
    for name in names[-ROWS:]:
        start = time.perf_counter()
        adapter = ready(engine, name)
        if isinstance(engine.runner, CompiledRunner):
            engine.runner.table.updates_of(adapter)
        swaps.append((time.perf_counter() - start) * 1e3)
    row("swap to another adapter in memory", statistics.median(swaps))


def single(engine: Engine, theirs: Any, rounds: int, new: int) -> None:
    """One greedy answer after another, through the engine and through `generate`."""
    prompt = tuple(torch.randint(100, 20000, (PROMPT,)).tolist())
    ours = Request(prompt, None, Sampling(max_new_tokens=new))
    tokens = torch.tensor([prompt])
    theirs.generation_config.eos_token_id = None
    engine._ends = frozenset()  # both go on to the last token

    def through_engine() -> float:
        return milliseconds(lambda: engine.submit(ours).result())

    def through_generate() -> float:
        options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return milliseconds(lambda: theirs.generate(tokens, **options))

    times = interleaved({"ours": through_engine, "theirs": through_generate}, rounds)
    row(f"{new} tokens, transformers' generate", times["theirs"])
    ratio = times["theirs"] / times["ours"]
    row(f"{new} tokens, engine", times["ours"], f"{ratio:.2f} × as fast")


def first_token(engine: Engine, rounds: int) -> None:
    """Time to the first token after 1,000 tokens, new ones and ones in the prefix cache."""
    draw = torch.Generator().manual_seed(1)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(100, 20000, (count,), generator=draw).tolist())

    cached = tokens(PREFIX)

    def ask(prefix: tuple[int, ...]) -> float:
        request = Request((*prefix, *tokens(8)), None, Sampling(max_new_tokens=1))
        return milliseconds(lambda: engine.submit(request).result())

    times = interleaved({"new": lambda: ask(tokens(PREFIX)), "cached": lambda: ask(cached)}, rounds)
    row(f"first token after {PREFIX:,} new tokens", times["new"])
    ratio = times["new"] / times["cached"]
    row(f"first token after {PREFIX:,} cached tokens", times["cached"], f"1/{ratio:.1f} of it")


def decoding(engine: Engine, adapters: list[Any], steps: int) -> Timed:
    """Return a round of greedy steps of one token for each row, after a prompt of 32."""
    greedy = [Sampler(Sampling())] * len(adapters)

    def run() -> float:
        runner = engine.runner
        for slot, adapter in enumerate(adapters):
            runner.step([Chunk(slot, range(100, 100 + PROMPT), 0, adapter, 0)])
        last = [7] * len(adapters)
        start = time.perf_counter()
        for at in range(steps):
            chunks = [
                Chunk(slot, (token,), PROMPT + at, adapter, 1, decoding=True)
                for slot, (token, adapter) in enumerate(zip(last, adapters, strict=True))
            ]
            last = [token.id for token in sample(runner.step(chunks), greedy)]
        spent = (time.perf_counter() - start) * 1e3 / steps
        for slot in range(len(adapters)):
            runner.free(slot)
        return spent

    return run


def plain_decoding(model: Any, options: dict[str, Any] | None, steps: int) -> Timed:
    """Return the same through a model's own forward, with transformers' cache."""

    def run() -> float:
        cache = DynamicCache()
        prompt = torch.arange(100, 100 + PROMPT).expand(ROWS, -1)
        model(input_ids=prompt, cache=cache, use_cache=True, logits_to_keep=1, **(options or {}))
        last = torch.full((ROWS, 1), 7)
        start = time.perf_counter()
        for _ in range(steps):
            out = model(input_ids=last, cache=cache, use_cache=True, **(options or {}))
            last = out.logits[:, -1:].argmax(-1)
        return (time.perf_counter() - start) * 1e3 / steps

    return run


def with_peft(model: Any) -> tuple[Any, dict[str, Any]]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEAR, init_lora_weights=False)
    theirs = get_peft_model(model, config, adapter_name="a0")
    for n in range(1, ROWS):
        theirs.add_adapter(f"a{n}", config)
    theirs.eval()
    return theirs, {"adapter_names": [f"a{n}" for n in range(ROWS)]}


def write_adapters(model: Any, home: Path) -> list[Path]:
    """Write 16 different adapters of rank 8 for all linear layers."""
    places = []
    for n in range(ROWS):
        with torch.inference_mode(False):
            veneer.attach(model, veneer.LoRA(rank=RANK, alpha=ALPHA, targets="all"), seed=n)
            with torch.no_grad():
                draw = torch.Generator().manual_seed(n)
                for name, weight in model.named_parameters():
                    if name.endswith("lora_B"):
                        weight.copy_(0.01 * torch.randn(weight.shape, generator=draw))
            veneer.save(model, home / str(n))
            veneer.detach(model)
        places.append(home / str(n))
    return places


def ready(engine: Engine, name: str) -> LoadedAdapter:
    return engine.adapters.get(mix_of(engine.library, name))


def interleaved(timed: dict[str, Timed], rounds: int) -> dict[str, float]:
    """Return the median of each, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for n in range(WARM_UPS + rounds):
        for name, run in timed.items():
            spent = run()
            if n >= WARM_UPS:
                times[name].append(spent)
    return {name: statistics.median(each) for name, each in times.items()}


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def row(what: str, spent: float, beside: str = "") -> None:
    print(f"| {what} | {spent:.2f} | {beside} |", flush=True)


if __name__ == "__main__":
    main()
