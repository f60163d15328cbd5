"""The engine: every answer is what its request alone would have got, whoever else is answered."""

from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from adapted import ids, shake, targets_named, tokenizer
from tiny import VOCAB, tiny
from veneer.generate.sampling import Sampling
from veneer.models.load import Base
from veneer.serve.engine import Engine
from veneer.serve.library import Library
from veneer.serve.request import EngineConfig, Request

PROMPT = tuple(ids(1, 20, seed=3)[0].tolist())
GREEDY = Sampling(max_new_tokens=12)
SMALL = EngineConfig(slots=4, chunk=16)


def base_of(architecture: str = "llama", **options: Any) -> Base:
    model = tiny(architecture, **options)
    # Nothing ends an answer before its length.
    model.generation_config.eos_token_id = None
    words = tokenizer(VOCAB)
    words.eos_token = None
    return Base(architecture, model, words)


def write_adapter(
    home: Path, architecture: str, *, seed: int, targets: str = "all", **options: Any
) -> Path:
    """Write an adapter that changes what the model says."""
    model = tiny(architecture)
    lora = veneer.LoRA(targets=targets_named(model, targets), **{"rank": 2, **options})
    shake(veneer.attach(model, lora), seed=seed, size=0.3)
    veneer.save(model, home)
    return home


@pytest.fixture
def adapters(tmp_path) -> dict[str, Path]:
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"rank": 2},
        "wide": {"rank": 5, "targets": "attention"},
        "dora": {"rank": 3, "dora": True},
    }
    return {
        name: write_adapter(tmp_path / name, "llama", seed=n, **kind)
        for n, (name, kind) in enumerate(kinds.items())
    }


def generated(architecture: str, home: Path | None, prompt: tuple[int, ...], new: int) -> list[int]:
    """Return what transformers' own generate says."""
    model = base_of(architecture).model
    if home is not None:
        veneer.load(model, home)
    tokens = torch.tensor([prompt])
    out = model.generate(tokens, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def said(engine: Engine, request: Request) -> list[int]:
    return [token.id for token in engine.submit(request).result().tokens]


def test_one_answer_equals_generate(adapters):
    with Engine(base_of(), Library(adapters), SMALL) as engine:
        for name in (None, *adapters):
            home = None if name is None else adapters[name]
            wanted = generated("llama", home, PROMPT, 12)
            assert said(engine, Request(PROMPT, name, GREEDY)) == wanted
