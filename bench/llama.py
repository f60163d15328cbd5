"""Does llama.cpp answer as Veneer does? The demo's task, adapter and merged model, counted.

    python -m bench.llama [--out dist/llama_cpp] [--questions 88] [--blocks]

Trains what the demo trains, without new tokens, which a LoRA file cannot carry, and once with them,
for the merged file. Then every question that training never showed is asked of Veneer in float32
and of llama.cpp, greedily. Where the tokens differ, the first token that differs is shown with its
margin: by how much our logits prefer our token to theirs. llama.cpp rounds what flows between
layers to 8 bits; how far its logits are from ours on the same text is measured beside it. Over the
same base in a GGUF file of float32 it rounds nothing, and is asked all of it again. With --blocks
Veneer trains and answers over the file itself, whose blocks are the frozen weights, and merges
nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import torch

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "tests")]

import cuisine  # noqa: E402
import demo  # noqa: E402

import veneer  # noqa: E402
from support.llama_cpp import LlamaCpp  # noqa: E402
from veneer.cli.console import quieten_libraries  # noqa: E402
from veneer.cli.tune import run_recipe  # noqa: E402
from veneer.data.chat import prompt_text  # noqa: E402
from veneer.data.rows import Message  # noqa: E402
from veneer.formats.adapters import read  # noqa: E402
from veneer.formats.capture import capture  # noqa: E402
from veneer.formats.gguf import adapter as gguf_adapter  # noqa: E402
from veneer.formats.gguf.model import kept_of, write_merged  # noqa: E402
from veneer.models.locate import locate  # noqa: E402

TOKENS, TOP = 32, 40  # of an answer at most; likeliest tokens that are kept of each step
BATCH = 22  # questions at a time, in Veneer


def trained(out: Path, *, new_words: str, model: str = demo.RECIPE.model) -> Path:
    """Return the demo's adapter in `out`, trained now if it is not there yet."""
    adapter = out / "lora_adapter"
    if not adapter.exists():
        rows = out.parent / "cuisine.jsonl"
        rows.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) + "\n" for row in cuisine.training_rows()]
        rows.write_text("".join(lines), encoding="utf-8")
        data = veneer.DataConfig(new_words=new_words)
        recipe = replace(demo.RECIPE, model=model, data=rows, rows=data, out=out)
        assert run_recipe(recipe, quiet=True) == 0
    return adapter


@dataclass(frozen=True)
class Answer:
    """A greedy answer's tokens, and of each step the likeliest ones with their logarithms."""

    tokens: list[int]
    likely: list[dict[int, float]]


class Answers:
    """What Veneer answers in float32, with the adapters that are active now."""

    def __init__(self, base: veneer.Base, prompts: list[list[int]]) -> None:
        self.prompts, self.tokenizer = prompts, base.tokenizer
        self.end = base.tokenizer.eos_token_id
        self.answers: list[Answer] = []
        for first in range(0, len(prompts), BATCH):
            self.answers += self._batch(base.model, prompts[first : first + BATCH])

    def _batch(self, model: Any, prompts: list[list[int]]) -> list[Answer]:
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        rows = zip(pads, prompts, strict=True)
        done = model.generate(
            torch.tensor([[self.end] * pad + prompt for pad, prompt in rows]),
            attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads]),
            do_sample=False,
            max_new_tokens=TOKENS,
            pad_token_id=self.end,
            return_dict_in_generate=True,
            output_logits=True,
        )
        answers = []
        for row, tokens in enumerate(done.sequences[:, longest:].tolist()):
            if self.end in tokens:
                tokens = tokens[: tokens.index(self.end) + 1]
            likely = []
            for step in done.logits[: len(tokens)]:
                values, ids = step[row].log_softmax(-1).topk(TOP)
                likely.append(dict(zip(ids.tolist(), values.tolist(), strict=True)))
            answers.append(Answer(tokens, likely))
        return answers

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def theirs(server: LlamaCpp, prompt: list[int], scales: dict[Path, float], end: int) -> Answer:
    reply = server.complete(prompt, scales, n_predict=TOKENS, n_probs=TOP)
    steps = reply["completion_probabilities"]
    tokens = [step["id"] for step in steps]
    if len(tokens) < TOKENS and tokens[-1:] != [end]:
        tokens.append(end)  # it stops before it reports the token
    likely = [{token["id"]: token["logprob"] for token in step["top_logprobs"]} for step in steps]
    return Answer(tokens, likely)


def line(
    what: str,
    expected: Answers,
    server: LlamaCpp,
    scales: dict[Path, float],
    keys: Sequence[str],
) -> None:
    """Print how many answers are the same, and of the others, where they part."""
    same = right = 0
    noise: list[float] = []
    parted: list[tuple[float, str]] = []
    for prompt, ours, key in zip(expected.prompts, expected.answers, keys, strict=True):
        other = theirs(server, prompt, scales, expected.end)
        right += cuisine.is_right(expected.text(other.tokens), key)
        for step, (a, b) in enumerate(zip(ours.tokens, other.tokens, strict=False)):
            here = ours.likely[step]
            there = other.likely[step] if step < len(other.likely) else {}
            if a != b:
                margin = here[a] - here.get(b, min(here.values()))
                texts = f"{expected.text(ours.tokens)!r}, llama.cpp {expected.text(other.tokens)!r}"
                parted.append((margin, texts))
                break
            first, second = list(here)[:2]
            if first in there and second in there:
                noise.append(abs(here[first] - here[second] - there[first] + there[second]))
        else:
            same += ours.tokens == other.tokens
    noise.sort()
    most, usual = noise[-1], noise[len(noise) * 95 // 100]
    under = sum(margin <= most for margin, _ in parted)
    count = len(keys)
    print(f"| {what:44} | {same:3} of {count} | {right:3} | {under} of {len(parted)} |", end="")
    print(f" {usual:.2f} | {most:.2f} |", flush=True)
    for margin, texts in parted:
        DIFFERING.append(f"{what}: margin {margin:.3f}. Veneer {texts}")


DIFFERING: list[str] = []


def dequantised(base: Path, out: Path) -> Path:
    """Write a GGUF file with every tensor in float32."""
    reader = gguf.GGUFReader(base)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def merged(base: Path, adapter: Path, out: Path, kind: str, what: str = "") -> LlamaCpp:
    """Return llama.cpp over a merged file."""
    file = out / f"{what or 'plain '}{kind}.gguf"
    report = write_merged(base, read(adapter), file, kind=kind)
    error = sum(tensor.error for tensor in report) / len(report)
    size = file.stat().st_size / 1e6
    print(
        f"note: {what}merged, {kind}: {size:.0f} MB; changed tensors are off by {error:.2%} on "
        f"average, {kept_of(report):.1%} of the adapter's change is left"
    )
    return LlamaCpp(file, context=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("dist/llama_cpp"))
    parser.add_argument("--questions", type=int, default=88)
    parser.add_argument("--blocks", action="store_true")
    asked = parser.parse_args()
    quieten_libraries()
    questions, keys = zip(*cuisine.held_out()[: asked.questions], strict=True)
    file = locate("smollm2-135m")
    assert isinstance(file, Path)
    print("| llama.cpp runs | as Veneer | right | under the noise | noise, 95 % | most |")
    print("|---|---|---|---|---|---|")

    model = str(file) if asked.blocks else demo.RECIPE.model
    plain = trained(asked.out / ("blocks" if asked.blocks else "plain"), new_words="", model=model)
    base, prompts = asking(questions, model=model)
    before = Answers(base, prompts)
    veneer.load(base.model, plain)
    lora = asked.out / "adapter.gguf"
    for note in gguf_adapter.write(capture(base.model), lora, base.model.config):
        print("note:", note)
    whole = Answers(base, prompts)
    veneer.use(base.model, {"default": 0.5})
    half = Answers(base, prompts)
    wide = dequantised(file, asked.out / "base.gguf")
    for running, exact, how in ((file, False, "Q4_1"), (wide, True, "float32")):
        server = LlamaCpp(running, [lora], context=512, exact=exact)
        line(f"{how} base + our LoRA file", whole, server, {lora: 1.0}, keys)
        line(f"{how} base + half of it", half, server, {lora: 0.5}, keys)
        line(f"{how} base + none of it", before, server, {lora: 0.0}, keys)
    if not asked.blocks:
        merged_files(file, plain, asked.out, questions, keys, whole)
    print("\nWhere they part, with how much our logits prefer our token:")
    print("\n".join(DIFFERING))


def merged_files(
    file: Path,
    plain: Path,
    out: Path,
    questions: Sequence[str],
    keys: Sequence[str],
    whole: Answers,
) -> None:
    for kind in ("q4_1", "q8_0", "f16"):
        server = merged(file, plain, out, kind)
        line(f"merged, {kind}", whole, server, {}, keys)

    extended = trained(out / "tokens", new_words=",".join(cuisine.NEW_WORDS))
    base, prompts = asking(questions, extended)
    answers = Answers(base, prompts)
    for kind in ("q4_1", "q8_0", "f16"):
        server = merged(file, extended, out, kind, "with new tokens, ")
        line(f"with new tokens, merged, {kind}", answers, server, {}, keys)


def asking(
    questions: Sequence[str], adapter: Path | None = None, *, model: str = demo.RECIPE.model
) -> tuple[veneer.Base, list[list[int]]]:
    """Return the base in float32, under an adapter where there is one, and the prompts."""
    base = veneer.load_base(model, dtype="float32")
    if adapter is not None:
        veneer.load(base.model, adapter, tokenizer=base.tokenizer)
    texts = [prompt_text(base.tokenizer, [Message("user", question)]) for question in questions]
    ids = base.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return base, [list(row) for row in ids]


if __name__ == "__main__":
    main()
