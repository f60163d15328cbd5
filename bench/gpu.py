"""The first card: are the laws kept on it, and how fast is a step there beside the peers?

python -m bench.gpu             checks, then measures, in nine minutes at most, and writes
                                docs/performance-gpu.md; the exit code is 1 where a law fails
python -m bench.gpu --pretend   does the same on the processor with small models; its times say
                                nothing, and nothing is written
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

import veneer
from bench import engines
from bench.products import replay_seconds
from bench.workloads import Workload, random_rows
from veneer.cli.console import quieten_libraries
from veneer.formats.convert import convert
from veneer.formats.quantized import write_quantized
from veneer.models import minigpt
from veneer.models.device import (
    begin_peak,
    device_name,
    peak_memory,
    resolve_device,
    use_device,
)
from veneer.models.load import open_base

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))  # the table of kinds, and how near a result has to be
from support.card_graphs import broken_graphs  # noqa: E402
from support.device_laws import LAWS, broken_laws, kinds_to_try  # noqa: E402

PAGE = ROOT / "docs" / "performance-gpu.md"
MARK = "<!-- measured: everything below is written by python -m bench.gpu -->"
MINUTES = 9.0
SHARES = {"laws": 0.35, "training": 0.45, "decoding": 0.2}  # of the time, once bases are written
WARM_UP, STEPS = 3, 8  # of each run
OBSERVED = 2  # steps after those that are timed: one with a profiler, one that counts waits


# The bases: random weights of shapes that people tune, on the disk for every engine.

SMALL = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPES: dict[str, Callable[[], Any]] = {
    "8B": lambda: LlamaConfig(  # Llama 3.1's: 8 layers of 32, and a quarter of the vocabulary
        **{"vocab_size": 32_064, "hidden_size": 4096, "intermediate_size": 14_336},
        **{"num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"max_position_embeddings": 8192, "rope_theta": 500_000.0},
    ),
    "0.6B": lambda: Qwen3Config(  # Qwen3's, whole but for the vocabulary
        **{"vocab_size": 49_152, "hidden_size": 1024, "intermediate_size": 3072},
        **{"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
        **{"head_dim": 128, "tie_word_embeddings": True, "max_position_embeddings": 8192},
    ),
    "small": lambda: LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2),
}


def write_base(shape: str, home: Path, device: torch.device) -> dict[str, Path]:
    """Write a base dense, and in 4 bits. Return both directories by their bits."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=torch.bfloat16)
    texts = ["a thin layer over a solid board", "the board stays as it was"]
    tokenizer = minigpt.wrap_tokenizer(minigpt.train_tokenizer(texts, vocab_size=300))
    veneer.write_model(model.cpu(), tokenizer, home / shape)
    source, _, _ = open_base(home / shape)
    list(write_quantized(source, tokenizer, home / f"{shape}-4", bits=4, name=shape))
    return {"dense": home / shape, "NF4": home / f"{shape}-4"}


def work_of(name: str, *, small: bool) -> Workload:
    """Return rows of 1,024 tokens, 8 a step, or of long-tailed lengths, 32 a step."""
    steps, draw = WARM_UP + STEPS + OBSERVED, np.random.default_rng(0)
    count, longest = (32, 1024) if name == "tailed" else (8, 1024)
    if small:
        count, longest = 4, 24
    lengths = [longest] * count
    if name == "tailed":  # the same in each step: what is timed differs by nothing else
        drawn = np.minimum(longest, 8 + draw.lognormal(np.log(longest / 5), 0.8, count))
        lengths = [int(n) for n in drawn]
    rows = random_rows(count, longest, 300)
    rows = [
        replace(row, tokens=row.tokens[:n], labels=row.labels[:n])
        for row, n in zip(rows, lengths, strict=True)
    ]
    return Workload(name, rows, [list(range(count))] * steps, [])


# One engine on one base, in a process of its own: its result is a line of JSON.


def run_engine(job: dict[str, Any]) -> dict[str, Any]:
    """Return what an engine's steps took: seconds, tokens, bytes, kernels and waits."""
    device, tokens = torch.device(job["device"]), []
    work = work_of(job["work"], small=job["small"])
    attention = "flash_attention_2" if find_spec("flash_attn") and device.type != "cpu" else "sdpa"
    if job["engine"] == "veneer":
        base = veneer.load_base(job["base"], device=device, dtype="bf16")
        steps = engines.run_veneer(base, work)
    elif job["engine"] == "unsloth":
        base = unsloth_base(job)
        steps = engines.run_padded(base.model, work)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            job["base"],
            **{"dtype": torch.bfloat16, "attn_implementation": attention, "device_map": device},
        )
        tokenizer = AutoTokenizer.from_pretrained(job["base"])
        base = veneer.Base(job["base"], model.requires_grad_(False), tokenizer)
        if job["engine"] == "peft":
            steps = engines.run_peft(base, work)
        else:  # TRL packs without mixing rows only where flash attention is
            packing = attention != "sdpa"
            steps = engines.run_trl(base, work, packing=packing, tokens=tokens)
    begin_peak(device)
    held = peak_memory(device)
    timed = [next(steps)[0] for _ in range(WARM_UP + STEPS)][WARM_UP:]
    peak = peak_memory(device)
    result = {
        "how": "" if job["engine"] == "veneer" else attention,
        "seconds": statistics.median(timed),
        "tokens": statistics.mean(tokens) if tokens else work.tokens(0),
        "peak": peak,
        "above": peak and held and peak - held,
    }
    if job["engine"] != "trl":  # which yields its steps when all are over
        result |= {"kernels": _kernels_of(steps, device), "waits": _waits_of(steps, device)}
    if job["engine"] == "veneer":
        labels = sum(row.label_tokens for row in work.examples)
        result["limit"] = replay_seconds(base.model, work.tokens(0), labels)
    return result


def unsloth_base(job: dict[str, Any]) -> veneer.Base:
    """Return a base with an adapter, loaded in the way that Unsloth's page shows."""
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        job["base"], max_seq_length=1024, dtype=torch.bfloat16, load_in_4bit=job["bits"] == "NF4"
    )
    model = FastLanguageModel.get_peft_model(
        model,
        **{"r": engines.RANK, "lora_alpha": engines.ALPHA, "target_modules": engines.LINEAR},
        **{"lora_dropout": 0, "bias": "none", "use_gradient_checkpointing": False},
    )
    return veneer.Base(job["base"], model, tokenizer)


def _kernels_of(steps: engines.Run, device: torch.device) -> int | None:
    """Return how many kernels the next step launches."""
    if device.type == "cpu":
        return next(steps) and None
    from torch.profiler import profile, supported_activities

    with profile(activities=supported_activities()) as profiler:
        next(steps)
    on_card = [e for e in profiler.events() if str(e.device_type) != "DeviceType.CPU"]
    return sum(not event.name.startswith("Mem") for event in on_card)


def _waits_of(steps: engines.Run, device: torch.device) -> int | None:
    """Return how often the next step waits for the card, that which reads the loss included."""
    if device.type != "cuda":
        return next(steps) and None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True, action="always") as seen:
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in seen)


def run_decoding(job: dict[str, Any]) -> dict[str, Any]:
    """Return the milliseconds of a step of 16 rows: of the base alone, and with 16 adapters; in
    vLLM too where `make proof-vllm` has installed it."""
    from bench import serving as s
    from support import vllm as other

    device = torch.device(job["device"])
    base = veneer.load_base(job["base"], device=device, dtype="bf16")
    with tempfile.TemporaryDirectory() as home, torch.inference_mode():
        places = s.write_adapters(base.model, Path(home))
        library = s.Library({str(n): place for n, place in enumerate(places)})
        engine = s.Engine(base, library, s.EngineConfig(slots=s.ROWS, adapter_bytes=2**40))
        engine._ends = frozenset()  # all go on to the last token
        rounds, steps, prompt = (1, 3, (7,) * s.SHORT) if job["small"] else (5, 128, (7,) * s.SHORT)
        result: dict[str, Any] = {"notices": list(engine.notices)}

        def answers(adapters: list[str | None]) -> float:
            sampling = s.Sampling(max_new_tokens=steps)
            begun = time.perf_counter()
            streams = [engine.submit(s.Request(prompt, name, sampling)) for name in adapters]
            assert {len(stream.result().tokens) for stream in streams} == {steps}
            return (time.perf_counter() - begun) * 1e3 / steps

        timed = {"base": [None] * s.ROWS, "16 adapters": [str(n) for n in range(s.ROWS)]}
        runs = {name: (lambda a=a: answers(a)) for name, a in timed.items()}
        result["Veneer"] = s.interleaved(runs, rounds)
        engine.close()
        if not (other.ENVIRONMENT / "bin" / "python").is_file():
            return result | {"not": f"vLLM is not in {other.ENVIRONMENT}; make proof-vllm."}
        options = {"dtype": "bfloat16", "max_loras": s.ROWS, "max_lora_rank": engines.RANK}
        reader = other.Vllm(Path(job["base"]), Path(home) / "vllm.log", **options)
        for n, place in enumerate(places):
            convert(place, Path(home) / f"peft-{n}", to="peft")
            reader.load(f"a{n}", Path(home) / f"peft-{n}")
        rows = {"base": [None] * s.ROWS, "16 adapters": [f"a{n}" for n in range(s.ROWS)]}
        runs = {
            n: (lambda a=a: reader.decode([(x, prompt) for x in a], steps=steps)[0])
            for n, a in rows.items()
        }
        result[f"vLLM {reader.version}"] = s.interleaved(runs, rounds)
        reader.close()
    return result


# The parts of the page: each returns lines, or raises.


def laws(device: torch.device, seconds: float, most: int | None) -> tuple[list[str], bool]:
    """Return a table of the laws, and whether each is kept."""
    until, kinds = time.monotonic() + seconds, kinds_to_try()[:most]
    torch.set_float32_matmul_precision("highest")  # no TF32: float32 is to be float32
    kept, failures, tried = dict.fromkeys(LAWS, 0), [], 0
    for kind in kinds:
        tried += 1
        for law, why in broken_laws(kind, device).items():
            kept[law] += not why
            failures += [f"- **{law}, {kind}**: {_one_line(why)}"] if why else []
        if time.monotonic() > until:
            break
    rows = [f"| {law} | {count} |" for law, count in kept.items()]
    for what, why in broken_graphs(device).items():
        rows.append(f"| {what} | {'no' if why else 'kept'} |")
        failures += [f"- **{what}**: {_one_line(why)}"] if why else []
    text = f"{tried} of {len(kinds)} kinds of adapters were tried; {len(failures)} laws are broken."
    return ["| law | kinds that keep it |", "|---|---:|", *rows, "", text, *failures], not failures


def in_process(job: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return what a process of its own makes of a job. Raises RuntimeError with why it did not."""
    command = [sys.executable, "-m", "bench.gpu", "--job", json.dumps(job)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, seconds)
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it took longer than {seconds:.0f} s") from None
    if done.returncode:
        raise RuntimeError(_one_line((done.stderr.strip() or "it ended").splitlines()[-1]))
    return json.loads(done.stdout.splitlines()[-1])


def training(bases: dict[str, dict[str, Path]], device: torch.device, seconds: float) -> list[str]:
    """Return a table of training steps beside the peers."""
    until, lines = time.monotonic() + seconds, []
    small, (first, *others) = "small" in bases, bases
    cells = [(first, "NF4", "tailed"), (first, "dense", "dense")]
    if others:
        cells = [(first, "NF4", "dense"), cells[0], (others[-1], "dense", "tailed"), cells[1]]
    for shape, bits, work in cells:
        title = (
            "| engine | tokens/s | × PEFT | step / R | peak (above the base) | kernels | waits |"
        )
        lines += ["", f"**{shape}, {bits}, {work} rows**", "", title, "|---" * 7 + "|"]
        rows: dict[str, dict[str, Any]] = {}
        for engine in ("peft", "veneer", "trl", "unsloth"):
            job = {"engine": engine, "base": str(bases[shape][bits]), "bits": bits, "work": work}
            job |= {"device": str(device), "small": small}
            try:
                if time.monotonic() > until:
                    raise RuntimeError("the time was over")
                rows[engine] = row = in_process(job, min(120.0, until - time.monotonic()))
            except RuntimeError as error:
                lines.append(f"| {engine} | not measured: {error} ||||||")
                continue
            speed = row["tokens"] / row["seconds"]
            peer = rows.get("peft")
            times = f"{speed / peer['tokens'] * peer['seconds']:.2f}" if peer else ""
            limit = f"{row['seconds'] / row['limit']:.2f}" if row.get("limit") else ""
            peak = f"{row['peak'] / 1e9:.2f} GB ({row['above'] / 1e9:.2f})" if row["peak"] else ""
            counts = [f"{row.get(n, '')}".replace("None", "") for n in ("kernels", "waits")]
            name = f"{engine} {row['how']}".strip()
            cells_of = [name, f"{speed:,.0f}", times, limit, peak, *counts]
            lines.append(f"| {' | '.join(cells_of)} |")
    return lines


def decoding(bases: dict[str, dict[str, Path]], device: torch.device, seconds: float) -> list[str]:
    """Return a table of decoding with 16 adapters over one base."""
    shape = next(reversed(bases))
    job = {"engine": "decoding", "base": str(bases[shape]["dense"]), "device": str(device)}
    result = in_process(job | {"small": "small" in bases}, seconds)
    notes = [*result.pop("notices"), *filter(None, [result.pop("not", None)])]
    lines = ["| 16 rows a step | base alone, ms | 16 adapters, ms | |", "|---|---:|---:|---|"]
    for engine, times in result.items():
        base, mixed = times["base"], times["16 adapters"]
        lines.append(f"| {engine} | {base:.2f} | {mixed:.2f} | {mixed / base:.2f} × the base |")
    return [*lines, "", *notes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretend", action="store_true", help="small models on the processor")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--kinds", type=int, help="of adapters to try the laws on; all")
    parser.add_argument("--only", default=",".join(SHARES), help="of laws, training, decoding")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    quieten_libraries()
    if asked.job:
        job = json.loads(asked.job)
        use_device(torch.device(job["device"]))
        run = run_decoding if job["engine"] == "decoding" else run_engine
        print(json.dumps(run(job)))
        return 0
    device = resolve_device("cpu" if asked.pretend else asked.device)
    if device.type == "cpu" and not asked.pretend:
        sys.exit("There is no accelerator here. --pretend does the same on the processor.")
    use_device(device)
    begun, parts = time.monotonic(), [part for part in SHARES if part in asked.only.split(",")]
    name = "No card: its times say nothing" if asked.pretend else device_name(device)
    lines = [f"## {name}", "", f"{_versions()}. Rank {engines.RANK}, all linear layers, bf16.", ""]
    print("\n".join(lines), flush=True)
    shapes = ["small"] if asked.pretend else ["8B", "0.6B"]
    kept, bases = True, {}
    with tempfile.TemporaryDirectory() as home:
        for part in parts:
            try:
                if part != "laws":
                    bases = bases or {s: write_base(s, Path(home), device) for s in shapes}
                left = asked.minutes * 60 - (time.monotonic() - begun)
                seconds = left * SHARES[part] / sum(SHARES[p] for p in parts[parts.index(part) :])
                if part == "laws":
                    most = 4 if asked.pretend and asked.kinds is None else asked.kinds
                    more, kept = laws(device, seconds, most)
                else:
                    more = {"training": training, "decoding": decoding}[part](
                        bases, device, seconds
                    )
            except Exception as error:  # what cannot be measured takes nothing else with it
                more, kept = [f"Not measured: {_one_line(error)}"], kept and part != "laws"
            lines += [f"### {part.capitalize()}", "", *more, ""]
            print("\n".join(lines[-len(more) - 3 :]), flush=True)
    lines.append(f"It took {(time.monotonic() - begun) / 60:.1f} minutes.")
    if not asked.pretend:
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), lines), encoding="utf-8")
    return 0 if kept else 1


def with_section(page: str, lines: list[str]) -> str:
    """Return the page with the section of a card, which replaces an earlier one of that card."""
    before, _, after = page.partition(MARK)
    sections = [f"## {text.strip()}" for text in f"\n{after.strip()}".split("\n## ")[1:]]
    own = "\n".join(lines)
    others = [section for section in sections if section.splitlines()[0] != lines[0]]
    return "\n\n".join([f"{before.rstrip()}\n\n{MARK}", *others, own]) + "\n"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300] or type(text).__name__


def _versions() -> str:
    names = ["torch", "transformers", "peft", "trl", "bitsandbytes", "triton", "liger-kernel"]
    names += ["flash-attn", "unsloth"]
    texts = []
    for name in names:
        with suppress(PackageNotFoundError):
            texts.append(f"{name} {version(name)}")
    return ", ".join(texts)


if __name__ == "__main__":
    sys.exit(main())
