"""MiniGPT from nothing: tokenizer, model and text are all made here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from veneer.data.columns import summarize
from veneer.data.encode import Encoder, encode_rows
from veneer.data.preview import preview
from veneer.data.rows import texts_of
from veneer.data.world_text import world_rows
from veneer.files import check_replaceable, size_of
from veneer.formats.merged import write_model
from veneer.models.minigpt import (
    MiniGPTConfig,
    MiniGPTForCausalLM,
    register,
    train_tokenizer,
    wrap_tokenizer,
)
from veneer.training.config import TrainConfig
from veneer.training.events import DataReady, Event, Written
from veneer.training.loop import train

DOCUMENTS = 12_000
TOKENS_PER_STEP = 2048


def pretrain(out: Path, *, steps: int = 1000, seed: int = 0) -> Iterator[Event]:
    """Train a MiniGPT on a small world of general knowledge, write it to `out`, yield events."""
    register()
    check_replaceable(out, marker="model.pt")
    course = TrainConfig(
        steps=steps, lr=3e-3, weight_decay=0.01, tokens_per_step=TOKENS_PER_STEP, seed=seed
    )
    rows = world_rows(seed, DOCUMENTS)
    texts = (text for row in rows for text in texts_of(row.value))
    tokenizer = wrap_tokenizer(train_tokenizer(texts))
    torch.manual_seed(seed)
    model = MiniGPTForCausalLM(MiniGPTConfig(vocab_size=len(tokenizer)))
    encoder = Encoder(tokenizer, max_length=model.config.context)
    examples, problems = encode_rows(encoder, rows)
    assert not problems, problems
    yield DataReady(summarize(examples), None, 0, preview(examples[0], tokenizer))
    yield from train(model, examples, course)
    write_model(model, tokenizer, out)
    yield Written("MiniGPT", out, size_of(out))
