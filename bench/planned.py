"""Does a run take the memory that was planned for it? Six kinds of run, each in its own process.

python -m bench.planned [KIND ...] --steps 5
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from typing import Any

from bench.engines import RANK, run_veneer
from bench.workloads import Workload, random_rows
from veneer.adapter.config import LoRA
from veneer.plan.config import PlanConfig
from veneer.plan.find import find_sizes
from veneer.plan.memory import RUNTIME
from veneer.plan.methods import adapted_layers
from veneer.plan.plan import Plan, make_plan
from veneer.training.memory import begin_measuring, process_memory

MODEL = "smollm2-135m"
# Rows a step, their length, and settings that differ from a plan's usual ones.
KINDS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "full": (8, 256, {"method": "full"}),
    "lora": (8, 256, {}),
    "qlora": (8, 256, {"method": "qlora"}),
    "recompute": (8, 256, {"recompute": "selective"}),
    "long": (1, 2048, {}),
    "many short": (64, 32, {}),
}


def planned(kind: str, *, runtime: int = RUNTIME) -> Plan:
    """Return the plan of a kind of run."""
    rows, length, settings = KINDS[kind]
    config = PlanConfig(tokens_per_batch=rows * length, max_length=length, **settings)
    sizes = find_sizes(MODEL)
    adapted = adapted_layers(sizes, LoRA(rank=RANK, targets="all"))
    return make_plan(config, sizes, adapted, runtime=runtime)


def measure(kind: str, steps: int) -> dict[str, int]:
    """Run a kind of training here; return its memory before any model, with one, and at most."""
    import veneer
    from veneer.cli.console import quieten_libraries
    from veneer.kernels import native

    quieten_libraries()
    native.load()
    runtime = process_memory("VmRSS")
    rows, length, _ = KINDS[kind]
    config = planned(kind).config
    bits = {"bits": config.base_bits} if config.base_bits < 16 else {}
    base = veneer.load_base(MODEL, dtype="bf16", **bits)
    examples = random_rows(rows * steps, length, base.tokenizer.vocab_size)
    order = [list(range(i, i + rows)) for i in range(0, rows * steps, rows)]
    work = Workload(kind, examples, order, [])
    gc.collect()
    loaded = process_memory("VmRSS")
    begin_measuring()
    for _ in run_veneer(base, work, full=config.method == "full", recompute=config.recompute):
        pass
    return {"runtime": runtime, "loaded": loaded, "peak": process_memory("VmHWM")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help=", ".join(KINDS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--here", action="store_true", help="run the one kind in this process")
    asked = parser.parse_args()
    if unknown := [kind for kind in asked.kinds if kind not in KINDS]:
        parser.error(f"unknown: {', '.join(unknown)}; kinds are {', '.join(KINDS)}")
    if asked.here:
        print(json.dumps(measure(asked.kinds[0], asked.steps)))
        return
    print("| run | planned | measured | planned / measured | before any model | loaded |")
    print("|---|---|---|---|---|---|")
    for kind in asked.kinds or KINDS:
        command = [sys.executable, "-m", "bench.planned", kind, "--here"]
        done = subprocess.run(
            [*command, "--steps", str(asked.steps)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{kind} failed:\n{done.stderr[-4000:]}")
        measured = json.loads(done.stdout.splitlines()[-1])
        peak = planned(kind).memory.peak
        megabytes = [f"{n / 1e6:,.0f} MB" for n in (peak, measured["peak"])]
        others = [f"{measured[name] / 1e6:,.0f} MB" for name in ("runtime", "loaded")]
        print(
            f"| {kind} | {' | '.join(megabytes)} | {peak / measured['peak']:.3f} | "
            f"{' | '.join(others)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
