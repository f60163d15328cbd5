"""The commands and their flags. What a command does is imported when it runs, not before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from veneer.adapter.config import LoRA
from veneer.adapter.method import Method
from veneer.algebra.config import CombineConfig, ExtractConfig
from veneer.cli.console import show_error
from veneer.cli.recipes import from_recipe
from veneer.compare.config import CompareConfig
from veneer.errors import ConfigError, VeneerError
from veneer.formats.names import FormatName, RuntimeName
from veneer.generate.sampling import Sampling
from veneer.plan.config import PlanConfig
from veneer.quant.settings import Bits
from veneer.run_directory import DEFAULT_OUT
from veneer.serve.config import ServeConfig
from veneer.training.config import TrainConfig
from veneer.training.recipe import DataConfig, DType

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
AnyAdapter = Annotated[
    Path, Parameter(help="Adapter of any format: a directory, a .gguf file, a .pt file of loralib.")
]
Force = Annotated[
    bool,
    Parameter(negative="", help="Use the adapter over this base even if it was made on another."),
]
AllowBin = Annotated[
    bool,
    Parameter(negative="", help="Read PEFT's adapter_model.bin too, of which only tensors."),
]
DTypeFlag = Annotated[
    DType, Parameter(help="Number format to compute in; auto takes the faster one here.")
]
BitsFlag = Annotated[
    Bits | None,
    Parameter(help="Pack the base's linear layers: 4 bits (NF4) or 8 a parameter."),
]
Picture = Annotated[
    Path | None, Parameter(help="Draw it too, as a heat map of blocks and kinds of layers.")
]
AdapterFormat = Annotated[Literal["native", "peft"], Parameter(help="Format of the adapter.")]
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
    out: Annotated[Path, Parameter(help="Directory for the results.")] = DEFAULT_OUT,
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
    picture: Picture = None,
) -> None:
    """Show which layers of MODEL would train, before anything does; or, of an adapter's directory,
    the size and effective rank of each of its changes."""
    from veneer.cli.commands import run_inspect

    run_inspect(model, lora, picture=picture)


@app.command
def diff(
    one: Annotated[Path, Parameter(help="Adapter directory.")],
    other: Annotated[Path, Parameter(help="Adapter directory, over the same base.")],
    /,
    *,
    picture: Picture = None,
) -> None:
    """Lay two adapters side by side: norms, effective ranks and cosine, layer by layer."""
    from veneer.cli.algebra import run_diff

    run_diff(one, other, picture=picture)


@app.command
def combine(
    *places: Annotated[
        Path, Parameter(help="Adapter directories, and last the directory for the result.")
    ],
    weights: Annotated[
        str | None,
        Parameter(help="A factor for each, such as 0.7,-0.3; 1 for all unless given."),
    ] = None,
    settings: Annotated[CombineConfig | None, Flat] = None,
    format: AdapterFormat = "native",
) -> None:
    """Make one adapter of several: a weighted sum, TIES, DARE; a negative weight takes one away."""
    from veneer.cli.algebra import run_combine

    run_combine(places, weights, settings or CombineConfig(), format=format)


@app.command
def extract(
    base: Model,
    tuned: Annotated[str, Parameter(help="The same model after full fine-tuning, by any name.")],
    out: Annotated[Path, Parameter(help="Directory for the adapter.")],
    /,
    *,
    settings: Annotated[ExtractConfig | None, Flat] = None,
    format: AdapterFormat = "native",
    force: Annotated[
        bool, Parameter(negative="", help="Go on even if TUNED does not look like a tuned BASE.")
    ] = False,
) -> None:
    """Find the adapter that lies in a full fine-tune: the change of each layer, cut to a rank."""
    from veneer.cli.algebra import run_extract

    # Without a rank or an energy, this says so.
    run_extract(base, tuned, out, settings or ExtractConfig(), format=format, force=force)


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
    bits: Annotated[Bits, Parameter(help="Bits a parameter: 4 (NF4) or 8.")] = 4,
    pack_head: PackHead = False,
) -> None:
    """Pack MODEL into the directory OUT, which is then a base that stays on disk while in use."""
    from veneer.cli.commands import run_quantize

    run_quantize(model, out, bits=bits, pack_head=pack_head)


@app.command
def merge(
    base: Model,
    adapter: Annotated[Path, Parameter(help="Adapter directory.")],
    out: Annotated[
        Path, Parameter(help="Directory for the merged model; or OUT.gguf, where BASE is GGUF too.")
    ],
    /,
    *,
    dtype: DTypeFlag = "auto",
    bits: BitsFlag = None,
    gguf_type: Annotated[
        str | None,
        Parameter(
            help="Into OUT.gguf: store changed tensors as q8_0, f16, ...; by default as they were."
        ),
    ] = None,
    probe: Annotated[
        Path | None, Parameter(help="Rows to compare merged and unmerged by, not a sample of ours.")
    ] = None,
    accept_loss: Annotated[
        bool, Parameter(negative="", help="Write the model even where merging loses too much.")
    ] = False,
    force: Force = False,
    allow_bin: AllowBin = False,
) -> None:
    """Bake ADAPTER into BASE, compare, and write a plain model to OUT."""
    if out.suffix == ".gguf":
        if dtype != "auto" or bits is not None:
            raise ConfigError("Into GGUF the base is not computed with: leave --dtype and --bits.")
        if probe is not None or accept_loss:
            raise ConfigError("Into GGUF nothing is probed: leave --probe and --accept-loss.")
        from veneer.cli.merge import run_merge_gguf

        return run_merge_gguf(base, adapter, out, kind=gguf_type, force=force, allow_bin=allow_bin)
    if gguf_type is not None:
        raise ConfigError("--gguf-type says how tensors lie in OUT.gguf, and OUT is no .gguf.")
    from veneer.cli.merge import run_merge

    return run_merge(
        base,
        adapter,
        out,
        dtype=dtype,
        bits=bits,
        probe=probe,
        accept_loss=accept_loss,
        force=force,
        allow_bin=allow_bin,
    )


@app.command
def convert(
    adapter: AnyAdapter,
    out: Annotated[Path, Parameter(help="Directory for the adapter; with gguf, a file.")],
    /,
    *,
    to: Annotated[FormatName, Parameter(help="Format to write.")],
    base: Annotated[
        str | None,
        Parameter(help="The adapter's base, where a format must know it; no weight of it is read."),
    ] = None,
    alpha: Annotated[
        float | None,
        Parameter(help="Alpha of all layers, which a .pt file of loralib's leaves out."),
    ] = None,
    enable_lora: Annotated[
        str | None,
        Parameter(help="Parts of loralib's fused layers that have factors: 101, first and last."),
    ] = None,
    rank: Annotated[
        int | None,
        Parameter(help="Give every layer this rank, filled up with zeros, and one scaling."),
    ] = None,
    approximate: Annotated[
        bool,
        Parameter(negative="", help="Write what a format cannot express as near as it can."),
    ] = False,
    force: Annotated[
        bool, Parameter(negative="", help="Replace the adapter that stands in OUT.")
    ] = False,
    allow_bin: AllowBin = False,
) -> None:
    """Write ADAPTER in another format, and say exactly what was folded or approximated for it."""
    from veneer.cli.convert import run_convert

    run_convert(
        adapter,
        out,
        to=to,
        base=base,
        alpha=alpha,
        enable_lora=enable_lora,
        rank=rank,
        approximate=approximate,
        force=force,
        allow_bin=allow_bin,
    )


@app.command
def check(
    adapter: AnyAdapter,
    /,
    *,
    for_: Annotated[RuntimeName, Parameter(name="--for", help="The runtime that is to load it.")],
) -> int:
    """Read ADAPTER as another runtime would, and say what it needs there: 0 if it will load."""
    from veneer.cli.check import run_check

    return run_check(adapter, for_)


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
    allow_bin: AllowBin = False,
) -> None:
    """Print MODEL's answer to PROMPT."""
    from veneer.cli.commands import run_generate

    run_generate(
        model,
        prompt,
        adapter,
        sampling or Sampling(),
        dtype=dtype,
        bits=bits,
        force=force,
        allow_bin=allow_bin,
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
    allow_bin: AllowBin = False,
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
        run_chat(
            model,
            adapter,
            sampling,
            dtype=dtype,
            bits=bits,
            force=force,
            allow_bin=allow_bin,
        )
        return
    if adapter is not None:
        raise ConfigError("--adapter and --compare exclude each other; compare names adapters.")
    run_compared_chat(
        model, compare, sampling, dtype=dtype, bits=bits, force=force, allow_bin=allow_bin
    )


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
