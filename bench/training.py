"""How fast and how small is a training step, beside the peers? One command, one table.

python -m bench.training dense --engines veneer,peft --rounds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from bench.workloads import WORKLOADS

WARM_UP = 2  # steps of each run that are not counted


def measure(engine: str, asked: argparse.Namespace, *, replay: bool) -> dict:
    """Run one engine in a process of its own and return what it reports."""
    command = [sys.executable, "-m", "bench.engines", engine, asked.workload]
    command += ["--model", asked.model, "--dtype", asked.dtype, "--steps", str(asked.steps)]
    command += ["--data", asked.data] if asked.data else []
    command += ["--replay"] if replay else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{engine} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def speed(runs: list[dict]) -> tuple[float, float, float]:
    """Return real tokens a second: the median over rounds, the lowest and the highest.

    A round is all of its steps after the warm-up, taken together: steps differ in length.
    """
    rates = [sum(run["tokens"][WARM_UP:]) / sum(run["seconds"][WARM_UP:]) for run in runs]
    return statistics.median(rates), min(rates), max(rates)


def table(results: dict[str, list[dict]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| engine | tokens/s (spread) | × PEFT | step / R | peak above weights | loss | eval |",
        "|---|---|---|---|---|---|---|",
    ]
    limits = [run["replay_seconds"] for runs in results.values() for run in runs]
    limit = statistics.median([seconds for seconds in limits if seconds])
    peer = next((speed(runs)[0] for name, runs in results.items() if "peft" in name), None)
    for engine, runs in results.items():
        middle, low, high = speed(runs)
        times = f"{middle / peer:.2f}" if peer else ""
        last = runs[-1]
        step = statistics.median(s for run in runs for s in run["seconds"][WARM_UP:])
        peak = statistics.median(run["peak_bytes"] for run in runs) / 1e9
        evaluation = "" if last["eval_loss"] is None else f"{last['eval_loss']:.4f}"
        ratio = f"{step / limit:.2f}" if len(set(last["tokens"])) == 1 else "-"
        lines.append(
            f"| {engine} | {middle:.0f} ({low:.0f} to {high:.0f}) | {times} | {ratio} "
            f"| {peak:.2f} GB | {last['losses'][0]:.3f} → {last['losses'][-1]:.3f} | {evaluation} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--engines", default="veneer,veneer-full,peft,trl")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--data")
    parser.add_argument("--json", action="store_true", help="print the raw results instead")
    asked = parser.parse_args()
    if asked.steps <= WARM_UP:
        parser.error(
            f"--steps is {asked.steps}, but the first {WARM_UP} are not counted; take more"
        )
    engines = asked.engines.split(",")
    results: dict[str, list[dict]] = {engine: [] for engine in engines}
    for _ in range(asked.rounds):
        for engine in engines:
            results[engine].append(measure(engine, asked, replay=engine == engines[0]))
    print(json.dumps(results) if asked.json else table(results))


if __name__ == "__main__":
    main()
