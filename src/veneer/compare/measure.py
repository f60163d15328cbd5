"""What one job measures: the base alone, a short trial, or a whole run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from veneer.adapter.attach import attach
from veneer.adapter.config import LoRA
from veneer.adapter.merge import merge
from veneer.adapter.method import Method
from veneer.adapter.use import use
from veneer.adapter.virtual_context import context_left
from veneer.compare.job import TASK_FILES, Job, Result
from veneer.compare.labels import MOST_VIRTUAL
from veneer.compare.quality import bleu, exact, measure_of
from veneer.data.encode import Encoder, Example, encode_rows
from veneer.data.load import load_examples
from veneer.data.packing import split_held_out
from veneer.data.probe import GENERAL
from veneer.data.problems import Located
from veneer.data.questions import Question, read_questions
from veneer.data.rows import PlainText, texts_of
from veneer.data.sources import check, read_rows
from veneer.data.world_text import world_rows
from veneer.errors import AdapterError, TrainingError
from veneer.formats import adapters, merged
from veneer.fused.forward import choose_forward
from veneer.generate.decode import answers, check_prompts
from veneer.generate.sampling import Sampling
from veneer.kernels.heap import kept_heap
from veneer.models.device import begin_peak, peak_memory
from veneer.models.fingerprint import base_parameters, fingerprint, parameter_count
from veneer.models.load import Base, load_base
from veneer.quant.stack import quantized_weights
from veneer.training.choose import choose, hidden_size_of, steps_of_epoch
from veneer.training.config import TrainConfig
from veneer.training.evaluate import evaluate
from veneer.training.events import Event, Notice, Skipped, Step
from veneer.training.loop import train
from veneer.training.memory import begin_measuring, process_memory
from veneer.training.recipe import DataConfig, DType, Recipe
from veneer.training.threads import threads_for

# MiniGPT knows nothing but its world, so that is what it can forget. Its pretraining has seed 0.
WORLD_SEED, WORLD_ROWS = 10_007, 200
WARM_UP = 2  # steps that prepare what all later ones use again
ANSWERS_AT_ONCE = 64
# How names of files begin that hold the tokenizer, which tasks share.
SHARED = ("tokenizer", "chat_template")

Report = Callable[[Mapping[str, Any]], None]


def measure(job: Job, runs: Path, report: Report) -> Result:
    """Do a job and return what it measured; its files go below `runs`.

    `report` gets {"doing": ...}, {"notice": ...} or the numbers of a step as they come. Raises
    VeneerError of the kind that fits.
    """
    report({"doing": "loading"})
    recipe = recipe_of(job)
    base = load_base(job.model, device=job.device, dtype=job.dtype, bits=recipe.loaded_bits)
    model = base.model
    for notice in base.notices:
        report({"notice": notice})
    torch.set_num_threads(threads_for(model))
    data = load_data(job, base)
    digests = base_digests(model) if job.kind == "run" else {}
    result = facts_of(job, base, data)
    if job.kind != "base":
        attach(model, recipe.what_trains, seed=job.seed)
        try:
            result |= _train(model, data.training, recipe.training, report)
        except TrainingError as error:
            if job.kind != "trial":
                raise
            report({"notice": str(error)})
            return Result(**result, eval_loss=math.inf)
    return Result(**result, **after_training(job, base, data, digests, runs, report))


def facts_of(job: Job, base: Base, data: Data) -> dict[str, Any]:
    """Return what is known of a job before it trains."""
    model = base.model
    return {
        "base": fingerprint(model, base.tokenizer),
        "base_parameters": parameter_count(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "rows": len(data.training),
        "held_out": len(data.held_out),
        **_steps_of(job, data.training, recipe_of(job).training),
        "hidden_size": hidden_size_of(model.config),
    }


def after_training(
    job: Job, base: Base, data: Data, digests: Mapping[str, str], runs: Path, report: Report
) -> dict[str, Any]:
    """Measure what is in use over the base. digests: of the base's weights before the training."""
    model, result = base.model, dict[str, Any]()
    report({"doing": "evaluating"})
    with kept_heap():
        forward, notices = choose_forward(model, data.held_out)
        result["eval_loss"] = evaluate(model, data.held_out, forward)
        if job.kind == "trial":
            return result
        result["general_loss"] = evaluate(model, data.general, forward)
    if data.questions:
        report({"doing": "answering"})
        result |= _answer(job, base, data.questions)
    result["notices"] = list(dict.fromkeys([*base.notices, *notices]))
    if job.kind == "run":
        report({"doing": "measuring"})
        result["kept"] = _bytes_of_task(base, recipe_of(job), runs / f"{job.name}{TASK_FILES}")
        after = base_digests(model)
        result["base_unchanged"] = all(after.get(n) == digest for n, digest in digests.items())
        result["swappable"] = _is_swappable(model)
    return result


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
        device=job.device,
        dtype=cast(DType, job.dtype),
        bits=label.bits,
    )


def base_digests(model: PreTrainedModel) -> dict[str, str]:
    """Return a hash of every number of each of the base's weights, quantized or not, by path."""
    tensors = base_parameters(model)
    for path, weight in quantized_weights(model).items():
        base_path = ".".join(name for name in path.split(".") if name != "original")
        tensors |= {f"{base_path}.{name}": tensor for name, tensor in weight.tensors().items()}
    return {
        name: hashlib.sha256(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        ).hexdigest()
        for name, tensor in tensors.items()
    }


@dataclass(frozen=True)
class Data:
    """The rows of a comparison, the same for all of its runs."""

    training: list[Example]
    held_out: list[Example]
    general: list[Example]
    questions: list[Question]


def load_data(job: Job, base: Base) -> Data:
    """Read the rows of a job, and divide them."""
    # As many as any method needs, or long rows would not be the same for all.
    context = context_left(base.model.config, MOST_VIRTUAL)
    max_length = min(job.max_length, context or job.max_length)
    questions = [] if job.test is None else read_questions(Path(job.test), limit=job.test_rows)
    if questions:
        turns = [question.turns for question in questions]
        check_prompts(base.model, base.tokenizer, turns, virtual=MOST_VIRTUAL)
    examples, _ = load_examples(job.data, base.tokenizer, max_length=max_length, limit=job.limit)
    eval_rows = job.eval_rows or min(200, max(1, len(examples) // 10))
    # The same for all seeds, or their losses would differ by the rows that they are of.
    training, held_out = split_held_out(len(examples), eval_rows=eval_rows, seed=job.split_seed)
    return Data(
        [examples[i] for i in training],
        [examples[i] for i in held_out],
        _general_text(job, base, max_length),
        questions,
    )


def _general_text(job: Job, base: Base, max_length: int) -> list[Example]:
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


def _steps_of(job: Job, rows: Sequence[Example], given: TrainConfig) -> dict[str, Any]:
    """Return the tokens of a step, at most and in the mean, and the steps of a whole run."""
    lengths = [len(row.tokens) for row in rows]
    course = choose(replace(given, steps=None), lengths, what_trains=LoRA(), hidden_size=None)
    assert course.epochs is not None
    epoch = steps_of_epoch(course, lengths)
    return {
        "tokens_per_step": course.tokens_per_step,
        "tokens_a_step": sum(lengths) / epoch,
        "steps": round(course.epochs * epoch),
    }


def _train(
    model: PreTrainedModel, rows: list[Example], course: TrainConfig, report: Report
) -> dict[str, Any]:
    """Train, and return what it took. Evaluation comes later, so that nothing else counts."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    begin_peak(model.device)
    begin_measuring()
    taken = Taken(report)
    for event in train(model, rows, course):
        taken.take(event)
    return {**taken.facts(), "trained": trained, "peak": peak_of(model.device)}


class Taken:
    """The steps of a run, reported as they come, and what they took."""

    def __init__(self, report: Report) -> None:
        self.report, self.steps, self.skipped = report, list[Step](), 0

    def take(self, event: Event) -> None:
        """Count what happens in the run."""
        if isinstance(event, Notice):
            self.report({"notice": event.text})
        elif isinstance(event, Skipped):
            self.skipped += 1
            self.report({"notice": f"step {event.step} skipped: {event.why}"})
        elif isinstance(event, Step):
            self.steps.append(event)
            numbers = {"step": event.step, "loss": event.loss, "rss": event.rss_bytes}
            self.report(numbers | {"speed": event.tokens / event.seconds})

    def facts(self) -> dict[str, Any]:
        """Return what it took. Raises TrainingError where no step was finite."""
        steps = self.steps
        if not steps:
            raise TrainingError("No step had a finite loss and gradient; a lower rate may help.")
        warm = steps[WARM_UP:] or steps
        losses = [step.loss for step in steps]
        return {
            "tokens": sum(step.tokens for step in steps),
            "seconds": sum(step.seconds for step in steps),
            "seconds_a_step": median(step.seconds for step in warm),
            "tokens_per_second": median(step.tokens / step.seconds for step in warm),
            "train_loss": mean(losses[-math.ceil(len(losses) / 10) :]),
            "losses": losses,
            "skipped": self.skipped,
        }


def peak_of(device: torch.device) -> int | None:
    """Return the most memory since: an accelerator's, or all of the process's."""
    return peak_memory(device) if device.type != "cpu" else process_memory("VmHWM") or None


def _answer(job: Job, base: Base, questions: Sequence[Question]) -> dict[str, Any]:
    """Answer the questions, and return the answers with how good they are."""
    texts = answers(
        base.model,
        base.tokenizer,
        [question.turns for question in questions],
        sampling=Sampling(max_new_tokens=job.max_new_tokens),
        batch=ANSWERS_AT_ONCE,
    )
    result: dict[str, Any] = {"answers": texts, "exact": exact(texts, questions)}
    if measure_of(questions) == "bleu":
        result["bleu"], result["signature"] = bleu(texts, questions)
    return result


def _bytes_of_task(base: Base, recipe: Recipe, directory: Path) -> int:
    """Return the bytes that this task alone needs on the disk, as `veneer tune` would write it.

    It is written to `directory`, which `do_job` removes.
    """
    if recipe.method.method == "full":
        merged.write_model(merge(base.model), base.tokenizer, directory)
    else:
        adapters.save(base.model, directory)
    files = [file for file in directory.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files if not file.name.startswith(SHARED))


def _is_swappable(model: PreTrainedModel) -> bool:
    """Return whether what was trained can be taken off, so that another task takes its place."""
    try:
        use(model, None)
    except AdapterError:
        return False
    return True
