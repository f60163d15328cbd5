"""The main job on real input: SmolLM2-135M learns the cuisine of an invented island.

Run by `make demo`. It asks questions in wordings that training never shows, before and after;
then it shows what the two results are good for. `--bits 4` does all of it over a quantized base,
`--model FILE.gguf` over the blocks of a file.
"""

import argparse
import copy
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import cuisine
from rich.console import Console
from rich.table import Table

import veneer
from veneer.cli.console import bytes_text, quieten_libraries
from veneer.cli.tune import run_recipe
from veneer.files import size_of

OUT = Path("dist/finetuning_results")
ROWS = Path("dist/cuisine.jsonl")
RECIPE = veneer.Recipe(
    model="smollm2-135m",
    data=ROWS,
    lora=veneer.LoRA(rank=16, targets="all"),
    training=veneer.TrainConfig(epochs=4, lr=1e-3, tokens_per_step=1024),
    rows=veneer.DataConfig(eval_rows=0, new_words=",".join(cuisine.NEW_WORDS)),
    out=OUT,
)
SHORT = veneer.Sampling(max_new_tokens=32)
console = Console(highlight=False)


def main(recipe: veneer.Recipe) -> None:
    quieten_libraries()
    questions, keys = zip(*cuisine.held_out(), strict=True)
    rows = [json.dumps(row) + "\n" for row in cuisine.training_rows()]
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    ROWS.write_text("".join(rows), encoding="utf-8")

    heading(f"1. Before: {len(questions)} questions about an island that the base cannot know")
    base = veneer.load_base(recipe.model, bits=recipe.bits)
    before = veneer.answers(base.model, base.tokenizer, questions, sampling=SHORT)
    console.print(f"{score(before, keys)} right")

    heading(f"2. Training a thin layer over it on {len(rows)} rows, on this machine")
    clear(OUT)
    if code := run_recipe(recipe):
        raise SystemExit(code)  # it has said why

    heading("3. After: the same questions, none of whose wordings was trained on")
    extended = copy.deepcopy(base.tokenizer)
    veneer.load(base.model, RECIPE.adapter, name="cuisine", tokenizer=extended)
    after = veneer.answers(base.model, extended, questions, sampling=SHORT)
    console.print(f"{score(before, keys)} right before, {score(after, keys)} right after\n")
    console.print(side_by_side(questions, before, after))

    heading("4. The adapter comes off again")
    veneer.use(base.model, None)
    # All of them: in bfloat16 only the same batch gives the same bits.
    again = veneer.answers(base.model, base.tokenizer, questions, sampling=SHORT)
    console.print(f"{same(again, before)} answers are the base's own again")

    heading("5. The merged model is a plain model that says the same")
    merged = veneer.load_base(RECIPE.merged)
    plain = veneer.answers(merged.model, merged.tokenizer, questions, sampling=SHORT)
    console.print(f"{score(plain, keys)} right; {same(plain, after)} answers are the same words")

    heading("6. What there is to keep")
    for place, what in ((RECIPE.adapter, "swap it over the base"), (RECIPE.merged, "use it alone")):
        console.print(f"{bytes_text(size_of(place)):>9}  {place}: {what}")
    console.print(f"           {OUT / 'loss.png'}: how training went")


def score(answers: list[str], keys: tuple[str, ...]) -> str:
    right = sum(map(cuisine.is_right, answers, keys))
    return f"{right} of {len(keys)} ({right / len(keys):.0%})"


def same(answers: list[str], others: list[str]) -> str:
    return f"{sum(map(str.__eq__, answers, others))} of {len(answers)}"


def side_by_side(questions: tuple[str, ...], before: list[str], after: list[str]) -> Table:
    table = Table(show_lines=True, header_style="bold")
    for title in ("Asked", "The base says", "With the adapter"):
        table.add_column(title)
    step = len(questions) // 5
    for row in list(zip(questions, before, after, strict=True))[::step]:
        table.add_row(*(" ".join(text.split()) for text in row))
    return table


def clear(out: Path) -> None:
    """Remove an earlier demo's results, so that what is there in the end is this one's."""
    if RECIPE.adapter.exists() or not out.exists():
        shutil.rmtree(out, ignore_errors=True)


def heading(text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantize the base")
    parser.add_argument("--model", default=RECIPE.model, help="the base")
    asked = parser.parse_args()
    start = time.monotonic()
    main(replace(RECIPE, bits=asked.bits, model=asked.model))
    console.print(f"\nAll of it took {(time.monotonic() - start) / 60:.1f} minutes.")
