"""`veneer generate` and `veneer chat`: one answer, or a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

import veneer
from veneer.cli.console import questions
from veneer.cli.flags import AdapterFlags, Flat, Model
from veneer.cli.loading import load_adapted
from veneer.cli.side_by_side import chat_side_by_side
from veneer.data.rows import Message
from veneer.errors import ConfigError
from veneer.generate.sampling import Sampling

if TYPE_CHECKING:
    from veneer.models.load import Base

AdapterDir = Annotated[
    Path | None, Parameter(name="--adapter", help="Adapter directory to use over the base.")
]


def generate(
    model: Model,
    prompt: Annotated[str, Parameter(help="What to ask the model.")],
    /,
    *,
    adapter: AdapterDir = None,
    sampling: Annotated[Sampling, Flat] = Sampling(),
    loading: Annotated[AdapterFlags, Flat] = AdapterFlags(),
) -> None:
    """Print the answer and nothing else."""
    base = _load(model, adapter, loading)
    _print_answer(base, [Message("user", prompt)], sampling)


def chat(
    model: Model,
    /,
    *,
    adapter: AdapterDir = None,
    sampling: Annotated[Sampling, Flat] = Sampling(),
    loading: Annotated[AdapterFlags, Flat] = AdapterFlags(),
    compare: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            help="NAME=DIRECTORY: ask this adapter too, side by side; one alone, beside the base.",
        ),
    ] = None,
) -> None:
    """Keep the conversation: each answer sees what came before."""
    if compare and adapter is not None:
        raise ConfigError("--adapter and --compare exclude each other; compare names adapters.")
    if compare:
        chat_side_by_side(model, compare, sampling, loading)
        return
    base = _load(model, adapter, loading)
    messages: list[Message] = []
    for question in questions():
        messages.append(Message("user", question))
        messages.append(Message("assistant", _print_answer(base, messages, sampling)))


def _load(model: str, adapter: Path | None, loading: AdapterFlags) -> Base:
    return load_adapted(model, {} if adapter is None else {"default": adapter}, loading)


def _print_answer(base: Base, messages: list[Message], sampling: Sampling) -> str:
    pieces = []
    for piece in veneer.stream(base.model, base.tokenizer, messages, sampling=sampling):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()
    return "".join(pieces)
