"""One job in a process of its own, so that its memory is its own: python -m veneer.compare.worker.

Reads NAME.job.json, says on its standard output how it goes, one JSON object a line, and leaves
NAME.json beside the job.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from threading import Thread
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from veneer.adapter.attach import attach
from veneer.adapter.config import LoRA
from veneer.adapter.merge import merge
from veneer.adapter.method import Method
from veneer.adapter.use import use
from veneer.adapter.virtual_context import context_left
from veneer.compare.job import JOB, KEPT, RESULT, Job, Result, write_result
from veneer.compare.labels import MOST_VIRTUAL
from veneer.compare.quality import bleu, exact, measure_of
from veneer.data.encode import Encoder, Example, encode_rows
from veneer.data.load import load_examples
from veneer.data.packing import StepOrder, split_held_out
from veneer.data.probe import GENERAL
from veneer.data.problems import Located
from veneer.data.questions import read_questions
from veneer.data.rows import Message, PlainText, texts_of
from veneer.data.sources import check, read_rows
from veneer.data.world_text import world_rows
from veneer.errors import AdapterError, TrainingError, VeneerError
from veneer.formats import adapters, merged
from veneer.fused.forward import choose_forward
from veneer.generate.decode import answers, check_prompts
from veneer.generate.sampling import Sampling
from veneer.kernels.heap import kept_heap
from veneer.models.fingerprint import base_parameters, fingerprint, parameter_count
from veneer.models.load import Base, load_base
from veneer.quant.weight import quantized_layers
from veneer.training.config import TrainConfig
from veneer.training.evaluate import evaluate
from veneer.training.events import Notice, Skipped, Step
from veneer.training.loop import train
from veneer.training.planned import begin_measuring, status
from veneer.training.recipe import DataConfig, DType, Recipe

# MiniGPT knows nothing but its world, so that is what it can forget. Its pretraining has seed 0.
WORLD_SEED, WORLD_ROWS = 10_007, 200
WARM_UP = 2  # steps that prepare what all later ones use again
ANSWERS_AT_ONCE = 64
# In a smaller model a second thread gains nothing, and waiting for it where the processor is busy
# with other things costs tenfold.
SMALL = 5_000_000
# What a directory holds for the tokenizer, which tasks share.
SHARED = ("tokenizer", "chat_template")

Tell = Callable[[Mapping[str, Any]], None]


def main(arguments: Sequence[str]) -> int:
    """Do the job that a file describes. Returns 1, having said why, where it cannot be done."""
    (path,) = map(Path, arguments)
    job = Job.read(path)
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = work(job, path.parent, _tell)
    except VeneerError as error:
        _tell({"error": str(error)})
        return 1
    write_result(path.with_name(path.name.removesuffix(JOB) + RESULT), job, result)
    return 0


def work(job: Job, runs: Path, tell: Tell) -> Result:
    """Do a job, whose place is `runs`, and return what it measured. Raises VeneerError of the kind
    that fits."""
    tell({"doing": "loading"})
    recipe = recipe_of(job)
    base = load_base(job.model, dtype=job.dtype, bits=recipe.bits)
    model = base.model
    for notice in base.notices:
        tell({"notice": notice})
    if parameter_count(model) < SMALL:
        torch.set_num_threads(1)
    rows = _rows(job, recipe, base)
    marks = fingerprint(model, base.tokenizer)
    before = base_digests(model) if job.kind == "run" else {}
    found: dict[str, Any] = {
        "base": marks,
        "base_parameters": parameter_count(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "rows": len(rows.training),
        "held_out": len(rows.held_out),
        "tokens_a_step": rows.tokens_a_step,
    }
    if job.kind != "base":
        attach(model, recipe.what_trains, seed=job.seed)
        try:
            found |= _train(model, rows.training, recipe.training, tell)
        except TrainingError as error:
            if job.kind != "trial":
                raise
            tell({"notice": str(error)})
            return Result(**found, eval_loss=math.inf)
    tell({"doing": "evaluating"})
    with kept_heap():
        forward, notices = choose_forward(model, rows.held_out)
        found["eval_loss"] = evaluate(model, rows.held_out, forward)
        if job.kind != "trial":
            found["general_loss"] = evaluate(model, rows.general, forward)
    if job.kind != "trial":
        if job.test is not None:
            tell({"doing": "answering"})
            found |= _answers(job, base)
        found["notices"] = list(dict.fromkeys([*base.notices, *notices]))
    if job.kind == "run":
        tell({"doing": "measuring"})
        found["kept"] = _kept_bytes(base, recipe, runs / f"{job.name}{KEPT}")
        after = base_digests(model)
        found["base_unchanged"] = all(after.get(name) == mark for name, mark in before.items())
        found["swappable"] = _swappable(model)
    return Result(**found)


def recipe_of(job: Job) -> Recipe:
    """Return what a job trains as a recipe. Raises ConfigError for what cannot be."""
    label = job.label
    return Recipe(
        model=job.model,
        data=Path(job.data),
        method=Method(**label.method),
        lora=LoRA(**label.lora),
        training=TrainConfig(
            steps=job.steps,
            lr=job.lr,
            lora_plus_ratio=label.lora_plus_ratio,
            tokens_per_step=job.tokens_per_step,
            seed=job.seed,
        ),
        rows=DataConfig(limit=job.limit, max_length=job.max_length),
        dtype=cast(DType, job.dtype),
        bits=label.bits,
    )


def base_digests(model: PreTrainedModel) -> dict[str, str]:
    """Return a hash of every number of each of the base's weights, packed or not, by its path."""
    tensors = base_parameters(model)
    for path, layer in quantized_layers(model).items():
        place = ".".join(part for part in path.split(".") if part != "original")
        tensors |= {f"{place}.{name}": t for name, t in layer.quantized_weight.tensors().items()}
    return {
        name: hashlib.sha256(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        ).hexdigest()
        for name, tensor in tensors.items()
    }


@dataclass(frozen=True)
class _Rows:
    training: list[Example]
    held_out: list[Example]
    general: list[Example]
    tokens_a_step: float


def _rows(job: Job, recipe: Recipe, base: Base) -> _Rows:
    # As many as any method needs, or long rows would not be the same for all.
    context = context_left(base.model, MOST_VIRTUAL)
    max_length = min(job.max_length, context or job.max_length)
    if job.test is not None:
        check_prompts(base.model, base.tokenizer, _asked(job), virtual=MOST_VIRTUAL)
    examples, _ = load_examples(recipe.data, base.tokenizer, max_length=max_length, limit=job.limit)
    aside = job.eval_rows or min(200, max(1, len(examples) // 10))
    # The same for all seeds, or their losses would differ by the rows that they are of.
    kept, held_out = split_held_out(len(examples), eval_rows=aside, seed=job.split_seed)
    training = [examples[i] for i in kept]
    order = StepOrder(
        [len(row.tokens) for row in training], job.tokens_per_step, job.tokens_per_step, job.seed
    )
    tokens = sum(len(row.tokens) for row in training)
    return _Rows(
        training,
        [examples[i] for i in held_out],
        _general(job, base, max_length),
        tokens / len(order.epoch(0)),
    )


def _general(job: Job, base: Base, max_length: int) -> list[Example]:
    """Return the text on which forgetting is measured, all of it as labels."""
    if job.general is not None:
        rows, problems = read_rows(Path(job.general))
        rows = check(rows, problems, skip_bad_rows=False)
    elif base.model.config.model_type == "minigpt":
        rows = world_rows(WORLD_SEED, WORLD_ROWS)
    else:
        rows, _ = read_rows(GENERAL)
    texts = [Located(PlainText("\n".join(texts_of(row.value))), row.place) for row in rows]
    examples, problems = encode_rows(Encoder(base.tokenizer, max_length=max_length), texts)
    return check(examples, problems, skip_bad_rows=False)


def _train(
    model: PreTrainedModel, rows: list[Example], course: TrainConfig, tell: Tell
) -> dict[str, Any]:
    """Train, and return what it took. Evaluation comes later, so that nothing else counts."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    _begin_measuring()
    steps: list[Step] = []
    skipped = 0
    for event in train(model, rows, course):
        if isinstance(event, Notice):
            tell({"notice": event.text})
        elif isinstance(event, Skipped):
            skipped += 1
            tell({"notice": f"step {event.step} skipped: loss or gradient not finite"})
        elif isinstance(event, Step):
            steps.append(event)
            speed = event.tokens / event.seconds
            tell({"step": event.step, "loss": event.loss, "speed": speed, "rss": event.rss_bytes})
    peak = _peak()
    if not steps:
        raise TrainingError("No step had a finite loss and gradient; a lower rate may help.")
    warm = steps[WARM_UP:] or steps
    losses = [step.loss for step in steps]
    return {
        "trained": trained,
        "tokens": sum(step.tokens for step in steps),
        "seconds": sum(step.seconds for step in steps),
        "seconds_a_step": median(step.seconds for step in warm),
        "tokens_per_second": median(step.tokens / step.seconds for step in warm),
        "train_loss": mean(losses[-math.ceil(len(losses) / 10) :]),
        "losses": losses,
        "skipped": skipped,
        "peak": peak,
    }


def _begin_measuring() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    begin_measuring()


def _peak() -> int | None:
    """Return the most memory since: the GPU's where there is one, else all of the process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return status("VmHWM") or None


def _asked(job: Job) -> list[Sequence[Message]]:
    """Return the conversations of the test, each up to its answer."""
    assert job.test is not None
    return [asked.turns for asked in read_questions(Path(job.test), limit=job.test_rows)]


def _answers(job: Job, base: Base) -> dict[str, Any]:
    assert job.test is not None
    questions = read_questions(Path(job.test), limit=job.test_rows)
    said = answers(
        base.model,
        base.tokenizer,
        _asked(job),
        sampling=Sampling(max_new_tokens=job.max_new_tokens),
        batch=ANSWERS_AT_ONCE,
    )
    found: dict[str, Any] = {"answers": said, "exact": exact(said, questions)}
    if measure_of(questions) == "bleu":
        found["bleu"], found["signature"] = bleu(said, questions)
    return found


def _kept_bytes(base: Base, recipe: Recipe, home: Path) -> int:
    """Return the bytes that this task alone needs on the disk, as `veneer tune` would write it.

    It is written to `home`, which whoever asked for the job takes away.
    """
    if recipe.method.method == "full":
        merged.write_model(merge(base.model), base.tokenizer, home)
    else:
        adapters.save(base.model, home)
    files = [file for file in home.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files if not file.name.startswith(SHARED))


def _swappable(model: PreTrainedModel) -> bool:
    """Return whether what was trained can be put aside, so that another task takes its place."""
    try:
        use(model, None)
    except AdapterError:
        return False
    return True


def _end_with_parent() -> None:
    """End where the other end of standard input is closed, as it is when the parent ends."""
    # Not through sys.stdin, whose lock a thread would hold while the interpreter ends.
    os.read(0, 1)
    os._exit(1)


def _tell(what: Mapping[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
