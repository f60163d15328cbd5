"""One engine on one workload, in a process of its own: prints one line of JSON.

python -m bench.engines ENGINE WORKLOAD --model ... --dtype ... --steps ...
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

import veneer
from bench.products import replay_seconds
from bench.shapes import SHAPES, random_base
from bench.workloads import WORKLOADS, Workload, workload
from veneer.cli.console import quieten_libraries
from veneer.data.encode import Example
from veneer.data.packing import pack
from veneer.formats.quantized import write_quantized
from veneer.fused.forward import choose_forward
from veneer.fused.recompute import Recompute
from veneer.kernels.heap import kept_heap
from veneer.models.device import CPU, synchronize
from veneer.models.load import open_base
from veneer.quant.settings import Bits
from veneer.training.memory import begin_measuring, process_memory
from veneer.training.optimizer import FlatAdamW

RANK, ALPHA, LR, CLIP, DROPOUT = 8, 16, 2e-4, 1.0, 0.05
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Run = Iterator[tuple[float, float]]  # (seconds, mean loss) of each step


def run_veneer(
    base: veneer.Base,
    work: Workload,
    *,
    full: bool = False,
    dora: bool = False,
    dropout: float = 0.0,
    recompute: Recompute = "none",
) -> Run:
    model = base.model
    lora = veneer.LoRA(rank=RANK, alpha=ALPHA, targets="all", dora=dora, dropout=dropout)
    veneer.attach(model, veneer.Method("full") if full else lora, seed=0)
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    optimizer = FlatAdamW(weights, lr=LR, weight_decay=0.0)
    with kept_heap():
        forward, notices = choose_forward(model, work.examples, recompute=recompute)
        assert not notices or model.device.type != "cpu", notices
        model.train()
        with forward.installed(model):
            for rows in work.steps:
                start = time.perf_counter()
                batch = pack(work.examples, rows)
                labels = int((batch.labels >= 0).sum())
                optimizer.begin()
                loss = forward(model, batch) / labels
                loss.backward()
                optimizer.step(lr=LR, clip=CLIP)
                synchronize(model.device)
                yield time.perf_counter() - start, float(loss.detach())
    optimizer.release()


def run_peft(base: veneer.Base, work: Workload, *, dora: bool = False, dropout: float = 0.0) -> Run:
    yield from run_padded(peft_model(base.model, dora=dora, dropout=dropout), work)


def run_loralib(base: veneer.Base, work: Workload) -> Run:
    import loralib

    for module in list(base.model.modules()):
        for name, layer in list(module.named_children()):
            if name in LINEAR:
                weight = layer.weight
                new = loralib.Linear(*weight.shape[::-1], r=RANK, lora_alpha=ALPHA, bias=False)
                new.to(weight.dtype).weight = weight
                setattr(module, name, new)
    loralib.mark_only_lora_as_trainable(base.model)
    yield from run_padded(base.model, work)


def run_padded(model: torch.nn.Module, work: Workload) -> Run:
    """Train what has a gradient in any model that takes rows as transformers does."""
    weights = [w for w in model.parameters() if w.requires_grad]
    device = weights[0].device
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0, fused=True)
    model.train()
    for rows in work.steps:
        start = time.perf_counter()
        loss = model(**padded([work.examples[i] for i in rows], device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        yield time.perf_counter() - start, float(loss.detach())


def run_trl(
    base: veneer.Base,
    work: Workload,
    *,
    packing: bool = False,
    tokens: list[int] | None = None,
) -> Run:
    """tokens: takes those of each step, which with packing are others than the workload's."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    marks: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            marks.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            synchronize(base.model.device)
            marks.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    rows = [work.examples[i] for step in work.steps for i in step]
    longest = max(len(row.tokens) for row in rows)
    size = work.tokens(0) // longest if packing else len(work.steps[0])
    data = Dataset.from_list(
        [
            {"input_ids": row.tokens, "completion_mask": [int(x >= 0) for x in row.labels]}
            for row in rows
        ]
    )
    config = SFTConfig(
        output_dir="dist/bench-trl",
        per_device_train_batch_size=size,
        max_steps=len(work.steps),
        learning_rate=LR,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=base.model.device.type == "cpu",
        bf16=False,
        max_length=longest if packing else None,
        packing=packing,
        completion_only_loss=True,
    )
    trainer = SFTTrainer(
        model=base.model,
        args=config,
        train_dataset=data,
        processing_class=base.tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEAR),
        callbacks=[Clock()],
    )
    # The same rows in the same steps as everybody else.
    data = trainer.train_dataset
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(data)
    if tokens is not None:
        lengths = list(map(len, data["input_ids"]))
        tokens += [sum(lengths[i : i + size]) for i in range(0, len(lengths), size)]
    trainer.train()
    seconds = [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)]
    yield from zip(seconds, losses, strict=False)


def peft_model(model, *, dora: bool = False, dropout: float = 0.0):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        target_modules="all-linear",
        use_dora=dora,
    )
    return get_peft_model(model, config)


def padded(rows: list[Example], device: torch.device = CPU) -> dict[str, torch.Tensor]:
    """Return rows as transformers takes them, padded on the right to the longest."""
    tokens = [torch.tensor(row.tokens) for row in rows]
    labels = [torch.tensor(row.labels) for row in rows]
    mask = [torch.ones(len(row.tokens), dtype=torch.long) for row in rows]
    batch = {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence(mask, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


ENGINES: dict[str, Callable[..., Run]] = {
    "veneer": run_veneer,
    "veneer-selective": lambda base, work: run_veneer(base, work, recompute="selective"),
    "veneer-dora": lambda base, work: run_veneer(base, work, dora=True),
    "veneer-dropout": lambda base, work: run_veneer(base, work, dropout=DROPOUT),
    "veneer-nf4": run_veneer,
    "veneer-nf4-dora": lambda base, work: run_veneer(base, work, dora=True),
    "veneer-int8": run_veneer,
    "veneer-full": lambda base, work: run_veneer(base, work, full=True),
    "peft": run_peft,
    "peft-dora": lambda base, work: run_peft(base, work, dora=True),
    "peft-dropout": lambda base, work: run_peft(base, work, dropout=DROPOUT),
    "peft-nf4": run_peft,
    "loralib": run_loralib,
    "trl": run_trl,
}


BITS: dict[str, Bits] = {"veneer-nf4": 4, "veneer-nf4-dora": 4, "veneer-int8": 8}


def load(engine: str, model: str, dtype: str) -> veneer.Base:
    """Return the base as the engine would have it; of random weights, by the name of its shape."""
    if model in SHAPES:
        return random_base(model, dtype)
    if engine != "peft-nf4":
        return veneer.load_base(model, dtype=dtype, bits=BITS.get(engine))
    # bitsandbytes' layers within transformers, with the very codes that ours has.
    source, tokenizer, _ = open_base(model)
    with tempfile.TemporaryDirectory() as place:
        list(write_quantized(source, tokenizer, Path(place) / "nf4", bits=4, name=model))
        theirs = AutoModelForCausalLM.from_pretrained(
            f"{place}/nf4", dtype={"bf16": torch.bfloat16, "float32": torch.float32}[dtype]
        )
    return veneer.Base(model, theirs, tokenizer)


def evaluation_loss(model, rows: list[Example]) -> float:
    """Return the mean loss per label token, by transformers' own forward for every engine."""
    total = labels = 0.0
    model.eval()
    with torch.no_grad():
        for row in rows:
            batch = padded([row])
            count = int((batch["labels"][:, 1:] >= 0).sum())
            total += float(model(**batch).loss) * count
            labels += count
    return total / labels


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--steps", type=int, default=7, help="0: one epoch")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--replay", action="store_true")
    asked = parser.parse_args()
    quieten_libraries()
    base = load(asked.engine, asked.model, asked.dtype)
    work = workload(asked.workload, base.tokenizer, steps=asked.steps, data=asked.data)
    gc.collect()
    before = process_memory("VmRSS")
    begin_measuring()
    steps = list(ENGINES[asked.engine](base, work))
    peak = process_memory("VmHWM") - before
    limit = None
    if asked.replay:
        labels = sum(work.examples[i].label_tokens for i in work.steps[-1])
        limit = replay_seconds(base.model, work.tokens(len(work.steps) - 1), labels)
    print(
        json.dumps(
            {
                "engine": asked.engine,
                "seconds": [seconds for seconds, _ in steps],
                "losses": [loss for _, loss in steps],
                "tokens": [work.tokens(i) for i in range(len(steps))],
                "peak_bytes": peak,
                "replay_seconds": limit,
                "eval_loss": evaluation_loss(base.model, work.held_out) if work.held_out else None,
            }
        )
    )


if __name__ == "__main__":
    main()
