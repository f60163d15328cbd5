"""The training loop: it yields what happens and prints nothing."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.adapter.adapter import Adapter
from veneer.adapter.attach import adapters, in_use
from veneer.adapter.layers import idle_adapters
from veneer.adapter.lora_plus import lr_ratios
from veneer.adapter.method import LEARNING_RATES, Method
from veneer.adapter.start import start_from_gradients
from veneer.adapter.virtual_forward import idle_virtual_tokens, virtual_input_count
from veneer.data.encode import Example
from veneer.data.packing import Batch, StepOrder, pack
from veneer.errors import DataError, TrainingError, differences, joined, listed
from veneer.fused.forward import Forward, choose_forward
from veneer.fused.recompute import Recompute
from veneer.kernels.heap import kept_heap
from veneer.training import checkpoint as checkpoints
from veneer.training.checkpoint import Checkpoint
from veneer.training.config import TrainConfig
from veneer.training.evaluate import evaluate
from veneer.training.events import (
    Checkpointed,
    Evaluated,
    Event,
    Notice,
    Skipped,
    Started,
    Step,
    Stopped,
    Trained,
)
from veneer.training.optimizer import FlatAdamW

SKIPS_IN_A_ROW = 3  # steps without a finite loss after which going on makes no sense


def train(
    model: PreTrainedModel,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    held_out: Sequence[Example] = (),
    directory: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train whatever of `model` requires a gradient on `examples`, and yield events.

    With a `directory`, checkpoints go there, and `resume` goes on from the newest, to the bit. It
    must have the same `identity`: what else decides the run's course. With `held_out` examples the
    model ends with the weights that were best on them, otherwise with the last.

    Raises TrainingError after three steps in a row without a finite loss, and where a checkpoint
    does not belong to this run; DataError where there is nothing to learn from.
    """
    run = _Run(model, examples, config, held_out, directory, dict(identity or {}))
    try:
        with kept_heap():
            forward, notices = choose_forward(model, examples, recompute=config.recompute)
            yield from map(Notice, notices)
            restored = resume and run.restore()
            if resume and not restored:
                yield Notice(f"There is no checkpoint in {directory} to go on from; a new start.")
            if not restored:
                # By the layers' own forward, which knows whole layers to compute again, or nothing.
                again: Recompute = "none" if forward.recompute == "none" else "full"
                plain = replace(forward, layers=(), recompute=again)
                start_from_gradients(model, lambda: plain(model, run.first_batch()))
            model.train()
            yield Started(run.steps, run.step)
            yield from run.go(forward, should_stop)
    finally:
        run.optimizer.release()
        model.eval()


class _Run:
    """The state of a run between two steps: all that a checkpoint must hold."""

    def __init__(
        self,
        model: PreTrainedModel,
        examples: Sequence[Example],
        config: TrainConfig,
        held_out: Sequence[Example],
        directory: Path | None,
        identity: dict[str, Any],
    ) -> None:
        if config.lr is None:
            acting = (c for n, c in adapters(model).items() if n in in_use(model))
            others = [c.method for c in acting if isinstance(c, Method)]
            config = replace(config, lr=LEARNING_RATES[others[0] if others else "lora"])
        assert config.lr is not None
        self.model, self.examples, self.config = model, examples, config
        self.held_out, self.directory = held_out, directory
        course = {k: v for k, v in asdict(config).items() if k not in ("save_every", "recompute")}
        self.identity = course | identity
        aside = chain(idle_adapters(model), idle_virtual_tokens(model))
        idle = {id(weight) for adapter in aside for weight in adapter.parameters()}
        self.weights: dict[str, nn.Parameter] = {
            name: weight
            for name, weight in model.named_parameters()
            if weight.requires_grad and id(weight) not in idle
        }
        # Adapters that started elsewhere than at zero add what they have become since.
        self.starting = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, Adapter) and id(module.lora_B) not in idle
        }
        if not self.weights:
            raise TrainingError("Nothing in this model trains; attach an adapter first.")
        if not examples:
            raise DataError("There are no rows to train on.")
        empty = [example.where for example in (*examples, *held_out) if not example.label_tokens]
        if empty:
            raise DataError(f"No token is learnt in {len(empty)} rows: {listed(empty)}.")
        self.order = StepOrder(
            [len(example.tokens) for example in examples],
            config.tokens_per_step,
            config.batch_tokens,
            config.seed,
            virtual_input_count(model),
        )
        self.step, self.epoch, self.step_in_epoch = 0, 0, 0
        self.skips, self.evaluations_since_best = 0, 0
        self.best_loss, self.best_step = math.inf, 0
        self.best_weights: dict[str, Tensor] | None = None
        self.steps_of_epoch = self.order.epoch(0)
        self.steps = config.steps or self._steps_in(config.epochs)
        torch.manual_seed(config.seed)
        # Last, for until it is released the weights are views of its buffers.
        ratio, lr = config.lora_plus_ratio, config.lr
        ratios = None if ratio is None else lr_ratios(model, ratio=ratio, lr=lr)
        self.optimizer = FlatAdamW(
            self.weights, lr=lr, weight_decay=config.weight_decay, ratios=ratios
        )

    def first_batch(self) -> Batch:
        """Return the batch that the run begins with."""
        return pack(self.examples, self.order.epoch(0)[0][0])

    def _steps_in(self, epochs: float) -> int:
        whole = sum(len(self.order.epoch(epoch)) for epoch in range(int(epochs)))
        part = epochs - int(epochs)
        rest = math.ceil(part * len(self.order.epoch(int(epochs)))) if part else 0
        return max(1, whole + rest)

    def go(self, forward: Forward, should_stop: Callable[[], bool]) -> Iterator[Event]:
        """Yield the events of all steps that are left."""
        config = self.config
        while self.step < self.steps:
            if self._out_of_patience():
                yield Stopped(self.step, "patience")
                break
            yield self._one_step(forward)
            at_end = self.step == self.steps or self.step_in_epoch == 0
            if self.held_out and (at_end or _due(self.step, config.eval_every)):
                yield self._evaluate(forward)
            stopping = should_stop()
            if self.directory and (
                at_end or stopping or self._out_of_patience() or _due(self.step, config.save_every)
            ):
                yield self._save()
            if stopping and self.step < self.steps:
                yield Stopped(self.step, "interrupted")
                return
        if self.best_weights is not None and self.best_step != self.step:
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(self.best_weights[name])
            yield Trained(self.step, self.best_step)
        else:
            yield Trained(self.step, self.step)

    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        return patience is not None and self.evaluations_since_best >= patience

    def _one_step(self, forward: Forward) -> Event:
        start = time.perf_counter()
        batches = [pack(self.examples, i) for i in self.steps_of_epoch[self.step_in_epoch]]
        self.step += 1
        self.step_in_epoch += 1
        if self.step_in_epoch == len(self.steps_of_epoch):
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
            self.steps_of_epoch = self.order.epoch(self.epoch)
        lr = self.config.lr_at(self.step, self.steps)
        labels = sum(int((batch.labels >= 0).sum()) for batch in batches)
        total = 0.0
        self.optimizer.begin()
        for batch in batches:
            loss = forward(self.model, batch)
            total += float(loss.detach())
            (loss / labels).backward()
        if not (math.isfinite(total) and self.optimizer.step(lr=lr, clip=self.config.clip)):
            self.optimizer.forget()
            return self._skip([i for batch in batches for i in batch.rows.tolist()])
        self.skips = 0
        tokens = sum(len(batch.tokens) for batch in batches)
        seconds = time.perf_counter() - start
        return Step(self.step, total / labels, lr, tokens, labels, seconds, rss_bytes())

    def _skip(self, rows: list[int]) -> Event:
        self.skips += 1
        named = tuple(self.examples[i].where for i in rows)
        if self.skips == SKIPS_IN_A_ROW:
            kept = (
                f" The last good checkpoint is kept in {self.directory}." if self.directory else ""
            )
            raise TrainingError(
                f"Loss or gradient was not finite in {SKIPS_IN_A_ROW} steps in a row, up to step "
                f"{self.step} (its rows: {listed(named)}). A lower --lr, or cleaner rows, "
                f"may help.{kept}"
            )
        return Skipped(self.step, named)

    def _evaluate(self, forward: Forward) -> Evaluated:
        tokens = self.config.batch_tokens
        loss = evaluate(self.model, self.held_out, forward, tokens_per_batch=tokens)
        best = loss < self.best_loss
        if best:
            self.best_loss, self.best_step = loss, self.step
            self.best_weights = {n: w.detach().clone() for n, w in self.weights.items()}
        self.evaluations_since_best = 0 if best else self.evaluations_since_best + 1
        perplexity = math.exp(min(loss, 700.0))
        return Evaluated(self.step, loss, perplexity, best)

    def _save(self) -> Checkpointed:
        assert self.directory is not None
        tensors = {f"weights/{n}": w.detach().clone() for n, w in self.weights.items()}
        for name, adapter in self.starting.items():
            tensors |= {f"{key}/{name}": w for key, w in adapter.named_buffers()}
        tensors |= self.optimizer.state()
        for name, weight in (self.best_weights or {}).items():
            tensors[f"best/{name}"] = weight
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
        progress = {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "skips": self.skips,
            "evaluations_since_best": self.evaluations_since_best,
            "best_loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "best_step": self.best_step,
            "identity": self.identity,
        }
        keep = {"best": self.best_step} if self.best_weights else {}
        saved = Checkpoint(self.step, tensors, progress)
        return Checkpointed(self.step, checkpoints.write(saved, self.directory, keep=keep))

    def restore(self) -> bool:
        """Go back to where the newest checkpoint was, and say whether there is one."""
        found = checkpoints.newest(self.directory) if self.directory else None
        if found is None:
            return False
        progress, tensors = found.progress, found.tensors
        differing = differences(progress["identity"], self.identity)
        stored = {
            name.removeprefix("weights/"): list(tensor.shape)
            for name, tensor in tensors.items()
            if name.startswith("weights/")
        }
        shapes = {name: list(weight.shape) for name, weight in self.weights.items()}
        differing += differences(stored, shapes)
        if "step" not in tensors:
            differing.append("it was written by another version of Veneer")
        if differing:
            raise TrainingError(
                f"The checkpoint in {self.directory} belongs to another run: "
                f"{joined(differing)}. Resume with the same settings, or start anew elsewhere."
            )
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[f"weights/{name}"])
        for name, adapter in self.starting.items():
            for key in ("start_A", "start_B"):
                if (start := tensors.get(f"{key}/{name}")) is not None:
                    setattr(adapter, key, start.to(adapter.lora_A))
        self.optimizer.load(tensors)
        best = {n: tensors[f"best/{n}"] for n in self.weights if f"best/{n}" in tensors}
        self.best_weights = best or None
        self.step = found.step
        self.epoch, self.step_in_epoch = progress["epoch"], progress["step_in_epoch"]
        self.skips = progress["skips"]
        self.evaluations_since_best = progress["evaluations_since_best"]
        self.best_loss = math.inf if progress["best_loss"] is None else progress["best_loss"]
        self.best_step = progress["best_step"]
        self.steps_of_epoch = self.order.epoch(self.epoch)
        torch.set_rng_state(tensors["rng/cpu"])
        if torch.cuda.is_available() and "rng/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng/cuda"])
        return True


def rss_bytes() -> int:
    """Return the resident memory of this process in bytes (0 where /proc is absent)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
