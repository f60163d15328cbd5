"""`veneer generate` and `veneer chat`: one answer, many, or a conversation."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.markup import escape

import veneer
from veneer.cli.console import ERRORS, OUTPUT, Pace, questions, refuse_to_replace, show_notice
from veneer.cli.flags import AdapterFlags, Flat, NamedModel, System
from veneer.cli.loading import NAME, load_adapted, opening
from veneer.cli.side_by_side import chat_side_by_side
from veneer.data.rows import Message
from veneer.errors import ConfigError, ModelError
from veneer.generate.sampling import Sampling

if TYPE_CHECKING:
    from veneer.models.load import Base

_ONE_OF = "Give either a PROMPT or --prompts FILE."
AdapterPath = Annotated[
    Path | None,
    Parameter(
        name="--adapter",
        help="Adapter to use over the base: of any format, a run's directory, or a checkpoint.",
    ),
]


def generate(
    model: NamedModel = None,
    prompt: Annotated[str | None, Parameter(help="What to ask the model.")] = None,
    /,
    *,
    adapter: AdapterPath = None,
    prompts: Annotated[
        Path | None,
        Parameter(
            help="Instead of PROMPT: a file of rows or of paragraphs, or - for standard input. "
            "Each answer is a line of JSON.",
            allow_leading_hyphen=True,
        ),
    ] = None,
    out: Annotated[
        Path | None, Parameter(help="With --prompts: file for the lines; else they are printed.")
    ] = None,
    batch_size: Annotated[
        int, Parameter(help="With --prompts: how many are answered at a time.")
    ] = 32,
    system: System = None,
    sampling: Annotated[Sampling, Flat] = Sampling(),
    loading: Annotated[AdapterFlags, Flat] = AdapterFlags(),
) -> None:
    """Print the answer and nothing else, or a line of JSON for each of many prompts."""
    if prompts is None and prompt is None and adapter is not None:
        model, prompt = None, model  # the one that is there is the PROMPT
    if prompts is not None and prompt is None:
        _answer_many(model, adapter, system, sampling, loading, prompts, out=out, batch=batch_size)
        return
    if prompts is not None or prompt is None:
        raise ConfigError(_what_is_missing(model) if prompt is None else _ONE_OF)
    if out is not None:
        raise ConfigError("--out is for --prompts; one answer is printed.")
    base = _load(model, adapter, loading)
    messages = [*opening(base, NAME, system), Message("user", prompt)]
    _print_answer(base, messages, sampling)


def chat(
    model: NamedModel = None,
    /,
    *,
    adapter: AdapterPath = None,
    system: System = None,
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
        chat_side_by_side(model, compare, system, sampling, loading)
        return
    base = _load(model, adapter, loading)
    messages = opening(base, NAME, system)
    for question in questions():
        messages.append(Message("user", question))
        messages.append(Message("assistant", _print_answer(base, messages, sampling)))


def _answer_many(
    model: str | None,
    adapter: Path | None,
    system: str | None,
    sampling: Sampling,
    loading: AdapterFlags,
    path: Path,
    *,
    out: Path | None,
    batch: int,
) -> None:
    from rich.progress import Progress

    from veneer.data.questions import behind, read_prompts

    if batch < 1:
        raise ConfigError(f"--batch-size is {batch}, but must be at least 1.")
    if out is not None:
        refuse_to_replace(out)
        if not out.parent.is_dir():
            raise ConfigError(f"There is no directory {out.parent} for --out; make it first.")
    prompts = read_prompts(path)
    if unused := Counter(key for prompt in prompts for key in prompt.value.unused):
        counts = ", ".join(f"{key!r} ({count:,})" for key, count in unused.most_common())
        show_notice(f"Keys of rows that nothing reads: {counts}.")
    base = _load(model, adapter, loading)
    from veneer.generate.many import answer_prompts, check_all

    prompts = behind(opening(base, NAME, system), prompts)
    check_all(base.model, base.tokenizer, prompts)
    count = f"{len(prompts):,} {'prompt' if len(prompts) == 1 else 'prompts'}"
    ERRORS.print(f"  Answering {count}, {min(batch, len(prompts)):,} at a time ...")
    # Progress on the terminal where the lines are printed would come between them.
    shown, pace = out is not None or not OUTPUT.is_terminal, Pace()
    with (
        nullcontext(sys.stdout) if out is None else out.open("w", encoding="utf-8") as file,
        Progress(console=ERRORS, transient=True, disable=not (shown and ERRORS.animates)) as bar,
    ):
        task = bar.add_task("Answers", total=len(prompts))

        def answered(done: int) -> None:
            bar.update(task, completed=done)
            last = done == len(prompts)
            if shown and not ERRORS.animates and pace.due(anyway=last):
                ERRORS.print(f"  {done:,} of {count} answered")

        def write(line: dict[str, Any]) -> None:
            # Whole lines at once, so that an interrupted run leaves no half of one.
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()

        answer_prompts(
            base.model,
            base.tokenizer,
            prompts,
            sampling=sampling,
            batch=batch,
            answered=answered,
            write=write,
        )
    if out is not None:
        answers = "1 answer" if len(prompts) == 1 else f"{len(prompts):,} answers"
        ERRORS.print(f"{answers} in {escape(str(out))}")


def _what_is_missing(model: str | None) -> str:
    """Say which of MODEL and PROMPT is missing where there is one of them, or none."""
    from veneer.models.locate import locate

    if model is None:
        return _ONE_OF
    try:
        locate(model)
    except ModelError:
        return (
            f"MODEL is missing: veneer generate MODEL {shlex.quote(model)}. It may be left out "
            "only beside an --adapter whose files name it."
        )
    return f"PROMPT is missing: veneer generate {shlex.quote(model)} PROMPT, or --prompts FILE."


def _load(model: str | None, adapter: Path | None, loading: AdapterFlags) -> Base:
    return load_adapted(model, {} if adapter is None else {NAME: adapter}, loading)


def _print_answer(base: Base, messages: list[Message], sampling: Sampling) -> str:
    pieces = []
    for piece in veneer.stream(base.model, base.tokenizer, messages, sampling=sampling):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()
    return "".join(pieces)
