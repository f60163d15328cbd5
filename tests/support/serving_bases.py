"""Small bases and adapters on disk, for what serves them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import veneer
from support.random_adapters import ids, shake, targets_named, tokenizer
from support.server import Server, running
from support.tiny_models import VOCAB, tiny
from veneer.formats.training import ComputedIn
from veneer.models.load import Base
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.library import Library
from veneer.serve.engine.request import EngineConfig
from veneer.serve.engine.served import Served

PROMPT = tuple(ids(1, 20, seed=3)[0].tolist())

# Of different ranks, targets and kinds, and one that does not start at zero.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 2, "targets": "all"},
    "wide": {"rank": 5, "targets": "attention"},
    "dora": {"rank": 3, "targets": "all", "dora": True},
    "pissa": {"rank": 2, "targets": "mlp", "init": "pissa"},
}


def base_of(architecture: str = "llama", model: PreTrainedModel | None = None) -> Base:
    """Return a random base whose answers nothing ends before their length."""
    model = tiny(architecture) if model is None else model
    model.generation_config.eos_token_id = None
    by_character = tokenizer(VOCAB)
    by_character.eos_token = None
    return Base(architecture, model, by_character)


@contextmanager
def computing_server(
    base: Base, adapters: dict[str, Path] | None = None, **options: Any
) -> Iterator[Server]:
    """Serve a base and adapters by an engine that computes, under the name of its architecture.
    options: of the server."""
    with Engine(base, Library(adapters or {}), EngineConfig(slots=4, chunk=16)) as engine:
        served = Served(
            engine=engine,
            library=engine.library,
            tokenizer=base.tokenizer,
            name=base.name,
            root="made/of/nothing",
            context=engine.context,
            computed_in=ComputedIn("float32"),
        )
        with running(served, **options) as server:
            server.served = served
            yield server


def hold(engine: Engine, until: Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps that decode wait for an event, so that no answer ends before it."""

    def held(chunks: Any, step: Any = engine.runner.step) -> Any:
        if any(chunk.decoding for chunk in chunks):
            until.wait()
        return step(chunks)

    monkeypatch.setattr(engine.runner, "step", held)


def write_adapter(
    home: Path,
    architecture: str,
    *,
    seed: int,
    make: Callable[[str], PreTrainedModel] = tiny,
    **options: Any,
) -> Path:
    """Write an adapter that changes what the model says."""
    model = make(architecture)
    targets = targets_named(model, options.pop("targets", "all"))
    shake(veneer.attach(model, veneer.LoRA(targets=targets, **options)), seed=seed, size=0.3)
    veneer.save(model, home, format="peft" if seed % 2 else "native")
    return home


def write_adapters(
    home: Path, architecture: str = "llama", make: Callable[[str], PreTrainedModel] = tiny
) -> dict[str, Path]:
    return {
        name: write_adapter(home / name, architecture, seed=seed, make=make, **kind)
        for seed, (name, kind) in enumerate(KINDS.items())
    }


def generated(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], new: int
) -> list[list[int]]:
    """Return what transformers' own generate says after prompts of one length."""
    tokens = torch.tensor(prompts)
    out = model.generate(tokens, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return out[:, tokens.shape[1] :].tolist()
