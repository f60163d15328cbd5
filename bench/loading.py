"""How long does it take to load an adapter over a base that is loaded, and to swap adapters?

python -m bench.loading --rounds 9

Side by side with PEFT, in one process, over two copies of one base, turn by turn; medians after two
warm-ups. The adapter is of rank 8 over all linear layers, in the format that both read.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import veneer
from veneer.cli.console import quieten_libraries

WARM_UP = 2
RANK = 8
SWAPS = 20  # taken together: one is too short for the clock


def write_adapters(home: Path, base: veneer.Base) -> None:
    """Write two adapters that change what the base says, `a` and `b`, and `a` natively too."""
    for number, name in enumerate("ab"):
        model = veneer.attach(base.model, veneer.LoRA(rank=RANK, targets="all"), seed=number)
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if path.endswith("lora_B"):
                    weight.normal_(std=0.01, generator=torch.Generator().manual_seed(number))
        veneer.save(model, home / name, format="peft")
        if name == "a":
            veneer.save(model, home / "native", tokenizer=base.tokenizer)
        veneer.detach(model)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def veneer_round(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, home: Path
) -> dict[str, float]:
    """Return the seconds of each thing, done once; the model is a plain base again at the end."""
    times = {"first": seconds(lambda: veneer.load(model, home / "a", name="a"))}
    times["second"] = seconds(lambda: veneer.load(model, home / "b", name="b"))
    times["swap"] = seconds(lambda: [veneer.use(model, "ab"[i % 2]) for i in range(SWAPS)]) / SWAPS
    veneer.detach(model)
    native = home / "native"
    times["native"] = seconds(lambda: veneer.load(model, native, tokenizer=tokenizer))
    veneer.detach(model)
    return times


def peft_round(model: PreTrainedModel, home: Path) -> dict[str, float]:
    wrapped: list[PeftModel] = []

    def load() -> None:
        wrapped.append(PeftModel.from_pretrained(model, home / "a", adapter_name="a"))

    times = {"first": seconds(load)}
    theirs = wrapped[0]
    times["second"] = seconds(lambda: theirs.load_adapter(str(home / "b"), "b"))
    names = ("a", "b")
    times["swap"] = (
        seconds(lambda: [theirs.set_adapter(names[i % 2]) for i in range(SWAPS)]) / SWAPS
    )
    theirs.unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    quieten_libraries()
    ours, theirs = (veneer.load_base(asked.model, dtype=asked.dtype) for _ in range(2))
    runs: dict[str, list[dict[str, float]]] = {"Veneer": [], "PEFT": []}
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        write_adapters(home, ours)
        for _ in range(WARM_UP + asked.rounds):
            runs["Veneer"].append(veneer_round(ours.model, ours.tokenizer, home))
            runs["PEFT"].append(peft_round(theirs.model, home))
    titles = {
        "first": "first adapter over the base",
        "second": "another beside it",
        "native": "native, with the tokenizer checked",
        "swap": "swap of the active adapter",
    }
    print(f"| milliseconds, median of {asked.rounds} (spread) | Veneer | PEFT | × |")
    print("|---|---|---|---|")
    for key, title in titles.items():
        cells, middles = [], []
        for rounds in runs.values():
            spread = [1000 * times[key] for times in rounds[WARM_UP:] if key in times]
            if not spread:
                cells.append("-")
                continue
            middles.append(statistics.median(spread))
            cells.append(f"{middles[-1]:.3g} ({min(spread):.3g} to {max(spread):.3g})")
        ratio = f"{middles[1] / middles[0]:.1f}" if len(middles) == 2 else ""
        print(f"| {title} | {' | '.join(cells)} | {ratio} |")
    cold = {name: 1000 * rounds[0]["first"] for name, rounds in runs.items()}
    print(f"\nThe very first load of the process: {cold}")


if __name__ == "__main__":
    main()
