"""The commands and their flags. What a command does is imported when it runs, not before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from veneer.cli.console import show_error
from veneer.cli.recipes import from_recipe
from veneer.compare.config import CompareConfig
from veneer.errors import ConfigError, VeneerError
from veneer.generate.sampling import Sampling
from veneer.lowrank.config import LoRA
from veneer.methods.config import Method
from veneer.plan.config import PackedBits, PlanConfig
from veneer.serve.config import ServeConfig
from veneer.training.config import TrainConfig
from veneer.training.recipe import OUT, DataConfig, DType

app = App(
    name="veneer",
    help="Teach a frozen language model something new with thin low-rank layers.",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # run() says what becomes of it
)
Flat = Parameter(name="*")
Model = Annotated[
    str, Parameter(help="Built-in name, local directory, .gguf file, or hub name of the base.")
]
Prompt = Annotated[str, Parameter(help="What to ask the model.")]
AdapterDir = Annotated[
    Path | None, Parameter(name="--adapter", help="Adapter directory to lay over the base.")
]
Force = Annotated[
    bool,
    Parameter(negative="", help="Use the adapter over this base even if it was made on another."),
]
DTypeFlag = Annotated[
    DType, Parameter(help="Number format to compute in; auto takes the faster one here.")
]
BitsFlag = Annotated[
    PackedBits | None,
    Parameter(help="Pack the base's linear layers: 4 bits (NF4) or 8 a parameter."),
]
PackHead = Annotated[bool, Parameter(help="With --bits, pack the head too.")]


@app.command(config=from_recipe)
def tune(
    model: Model,
    data: Annotated[
        Path, Parameter(help="Rows to learn: .jsonl, .json, .csv, .parquet, .txt, or a directory.")
    ],
    *,
    method: Annotated[Method | None, Flat] = None,
    lora: Annotated[LoRA | None, Flat] = None,
    training: Annotated[TrainConfig | None, Flat] = None,
    rows: Annotated[DataConfig | None, Flat] = None,
    dtype: DTypeFlag = "auto",
    bits: BitsFlag = None,
    pack_head: PackHead = False,
    out: Annotated[Path, Parameter(help="Directory for the results.")] = OUT,
    config: Annotated[
        Path | None, Parameter(help="Recipe of an earlier run; flags given here override it.")
    ] = None,
    resume: Annotated[
        bool, Parameter(negative="", help="Go on from the newest checkpoint in --out.")
    ] = False,
    force: Annotated[
        bool, Parameter(negative="", help="Replace the results of an earlier run in --out.")
    ] = False,
    ignore_plan: Annotated[
        bool, Parameter(negative="", help="Go ahead even where the memory planned is not there.")
    ] = False,
    tensorboard: Annotated[
        bool, Parameter(negative="", help="Write curves for TensorBoard too, below --out.")
    ] = False,
    quiet: Annotated[bool, Parameter(negative="", help="Print only errors.")] = False,
) -> int:
    """Train an adapter over MODEL on DATA, and keep it two ways: alone, and merged."""
    from veneer.cli.tune import run_tune
    from veneer.training.recipe import Recipe

    recipe = Recipe(
        model=model,
        data=data,
        method=method or Method(),
        lora=lora or LoRA(),
        training=training or TrainConfig(),
        rows=rows or DataConfig(),
        dtype=dtype,
        bits=bits,
        pack_head=pack_head,
        out=out,
    )
    return run_tune(
        recipe,
        resume=resume,
        force=force,
        ignore_plan=ignore_plan,
        tensorboard=tensorboard,
        quiet=quiet,
    )


@app.command
def compare(
    model: Model,
    data: Annotated[Path, Parameter(help="Rows to learn, in any form that veneer tune takes.")],
    /,
    *,
    settings: Annotated[CompareConfig | None, Flat] = None,
    out: Annotated[Path, Parameter(help="Directory for the results.")] = Path("dist/comparison"),
    resume: Annotated[
        bool, Parameter(negative="", help="Go on: runs that ended in --out are not done again.")
    ] = False,
    force: Annotated[
        bool, Parameter(negative="", help="Replace an earlier comparison in --out.")
    ] = False,
    quiet: Annotated[bool, Parameter(negative="", help="Print only errors.")] = False,
) -> int:
    """Train MODEL on DATA by several methods, with an equal budget, and lay them side by side."""
    from veneer.cli.compare import run_compare

    return run_compare(
        model,
        data,
        settings or CompareConfig(),
        out=out,
        resume=resume,
        force=force,
        quiet=quiet,
    )


@app.command
def inspect(
    model: Model,
    /,
    *,
    lora: Annotated[LoRA | None, Flat] = None,
) -> None:
    """Show which layers of MODEL would train, and how many parameters, before anything does."""
    from veneer.cli.commands import run_inspect

    run_inspect(model, lora or LoRA())


@app.command
def plan(
    model: Annotated[
        str, Parameter(help="Preset (llama-2-70b, ...), config.json, or directory that has one.")
    ],
    /,
    *,
    lora: Annotated[LoRA | None, Flat] = None,
    settings: Annotated[PlanConfig | None, Flat] = None,
    tokens: Annotated[int | None, Parameter(help="Short for --tokens-per-batch.")] = None,
    formulas: Annotated[
        bool, Parameter(negative="", help="Show the formula of each line of memory.")
    ] = False,
) -> None:
    """Show parameters and memory of any method over MODEL, without loading it, and what fits."""
    from veneer.cli.plan import run_plan

    settings = settings or PlanConfig()
    if tokens is not None:
        if settings.tokens_per_batch != PlanConfig().tokens_per_batch:
            raise ConfigError("--tokens is short for --tokens-per-batch; give one of them.")
        settings = replace(settings, tokens_per_batch=tokens)
    run_plan(model, lora or LoRA(), settings, formulas=formulas)


@app.command
def pretrain(
    out: Annotated[Path, Parameter(help="Directory for the model.")] = Path("dist/minigpt"),
    /,
    *,
    steps: Annotated[int, Parameter(help="Optimizer steps.")] = 1000,
    seed: Annotated[int, Parameter(help="Decides the text and the model's start.")] = 0,
) -> None:
    """Train MiniGPT from nothing, in about a minute, on a small world of general knowledge."""
    from veneer.cli.commands import run_pretrain

    run_pretrain(out, steps=steps, seed=seed)


@app.command
def quantize(
    model: Model,
    out: Annotated[Path, Parameter(help="Directory for the packed model.")],
    /,
    *,
    bits: Annotated[PackedBits, Parameter(help="Bits a parameter: 4 (NF4) or 8.")] = 4,
    pack_head: PackHead = False,
) -> None:
    """Pack MODEL into the directory OUT, which is then a base that stays on disk while in use."""
    from veneer.cli.commands import run_quantize

    run_quantize(model, out, bits=bits, pack_head=pack_head)


@app.command
def merge(
    base: Model,
    adapter: Annotated[Path, Parameter(help="Adapter directory.")],
    out: Annotated[Path, Parameter(help="Directory for the merged model.")],
    /,
    *,
    dtype: DTypeFlag = "auto",
    bits: BitsFlag = None,
    force: Force = False,
) -> None:
    """Bake ADAPTER into BASE and write a plain model to OUT."""
    from veneer.cli.commands import run_merge

    run_merge(base, adapter, out, dtype=dtype, bits=bits, force=force)


@app.command
def generate(
    model: Model,
    prompt: Prompt,
    /,
    *,
    adapter: AdapterDir = None,
    sampling: Annotated[Sampling | None, Flat] = None,
    dtype: DTypeFlag = "auto",
    bits: BitsFlag = None,
    force: Force = False,
) -> None:
    """Print MODEL's answer to PROMPT."""
    from veneer.cli.commands import run_generate

    run_generate(
        model, prompt, adapter, sampling or Sampling(), dtype=dtype, bits=bits, force=force
    )


@app.command
def chat(
    model: Model,
    /,
    *,
    adapter: AdapterDir = None,
    sampling: Annotated[Sampling | None, Flat] = None,
    dtype: DTypeFlag = "auto",
    bits: BitsFlag = None,
    force: Force = False,
    compare: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            help="NAME=DIRECTORY: ask this adapter too, side by side; one alone, beside the base.",
        ),
    ] = None,
) -> None:
    """Talk with MODEL; an empty line or Ctrl-D ends it."""
    from veneer.cli.commands import run_chat
    from veneer.cli.side_by_side import run_compared_chat

    sampling = sampling or Sampling()
    if not compare:
        run_chat(model, adapter, sampling, dtype=dtype, bits=bits, force=force)
        return
    if adapter is not None:
        raise ConfigError("--adapter and --compare exclude each other; compare names adapters.")
    run_compared_chat(model, compare, sampling, dtype=dtype, bits=bits, force=force)


@app.command
def serve(
    model: Model,
    /,
    *,
    adapter: Annotated[
        list[str] | None,
        Parameter(negative="", help="NAME=DIRECTORY: serve this adapter; may be given repeatedly."),
    ] = None,
    settings: Annotated[ServeConfig | None, Flat] = None,
    dtype: DTypeFlag = "auto",
    bits: BitsFlag = None,
) -> None:
    """Serve MODEL and any number of adapters over it: OpenAI's protocol, and a page."""
    from veneer.cli.serve import run_serve

    run_serve(model, adapter or [], settings or ServeConfig(), dtype=dtype, bits=bits)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (VeneerError, CycloptsError, OSError) as error:  # OSError: a full disk, for example
        show_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    return code or 0
