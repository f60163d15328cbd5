"""The commands. A command's flags are in its own module, which is imported when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from cyclopts import (
    App,
    CoercionError,
    CycloptsError,
    Group,
    MissingArgumentError,
    UnknownOptionError,
    UnusedCliTokensError,
)
from cyclopts.help import DefaultFormatter, HelpPanel, InlineText
from rich.console import Console, ConsoleOptions
from rich.text import Text

from veneer.cli.console import ERRORS, is_at_terminal, show_error, warnings_as_notices
from veneer.cli.recipes import from_recipe, trials_from_recipe
from veneer.cli.several_data import data_flags, joined_data
from veneer.cli.whole_numbers import whole_numbers
from veneer.errors import ConfigError, VeneerError
from veneer.files import storage_error


class Paragraphs(DefaultFormatter):
    """Shows a flag's help as one paragraph, however many lines its source has."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        for entry in panel.entries:
            if isinstance(entry.description, InlineText):
                words = str(entry.description.primary_renderable).split()
                entry.description.primary_renderable = Text(" ".join(words))
        super().__call__(console, options, panel)


def version_text() -> str:
    """Return the version, what this installation is made of, and what it runs on."""
    from importlib.metadata import PackageNotFoundError, version
    from platform import python_version

    from veneer.kernels.prebuilt import build

    try:
        torch = f"torch {version('torch')}"
    except PackageNotFoundError:
        torch = "no torch"
    return f"{version('veneer')} ({build()}, Python {python_version()}, {torch})"


# The headings of --help, in their order.
TRAIN = Group.create_ordered("Train")
ANSWER = Group.create_ordered("Answer")
INSPECT = Group.create_ordered("Inspect and check")
WRITE = Group.create_ordered("Write adapters and models")
HELP = Group.create_ordered("Help")
app = App(
    name="veneer",
    version=version_text,
    help="Teach a frozen language model something new with thin low-rank layers.",
    help_format="plaintext",
    help_formatter=Paragraphs(),
    config=whole_numbers,
    suppress_keyboard_interrupt=False,  # run() turns it into an exit code
)
for flag in ("--help", "--version"):
    app[flag].group = (HELP,)
app.command(
    "veneer.cli.tune:tune",
    group=TRAIN,
    synonym=("train", "finetune", "fine-tune", "lora", "sft", "fit"),  # what others call it
    help="Train an adapter over MODEL on DATA, and keep it two ways: alone, and merged. "
    "Epochs, tokens a step, rate and held-out rows are chosen from both unless given.",
    config=(from_recipe, whole_numbers),
)
app.command(
    "veneer.cli.search:search",
    group=TRAIN,
    synonym=("sweep", "hpo"),
    help="Try settings of tune for MODEL on DATA, several at a time over one base: bad ones end "
    "early, and the best one's adapter and recipe stay.",
    config=(trials_from_recipe, whole_numbers),
)
app.command(
    "veneer.cli.compare:compare",
    group=TRAIN,
    help="Train MODEL on DATA by several methods with an equal budget, and compare the results.",
)
app.command(
    "veneer.cli.inspect:inspect",
    group=INSPECT,
    help="Show which layers of MODEL would train, before anything does; or, of an adapter's "
    "directory, the size and effective rank of each of its changes.",
)
app.command(
    "veneer.cli.inspect:diff",
    group=INSPECT,
    help="Compare two adapters: norms, effective ranks and cosine, layer by layer.",
)
app.command(
    "veneer.cli.algebra:combine",
    group=WRITE,
    help="Make one adapter of several: a weighted sum, TIES, DARE; a negative weight takes one "
    "away.",
)
app.command(
    "veneer.cli.algebra:extract",
    group=WRITE,
    help="Find the adapter that lies in a full fine-tune: the change of each layer, cut to a rank.",
)
app.command(
    "veneer.cli.plan:plan",
    group=INSPECT,
    help="Show parameters and memory of any method over MODEL, without loading it, and what fits.",
)
app.command(
    "veneer.cli.bases:pretrain",
    group=TRAIN,
    help="Train MiniGPT from nothing, in about a minute, on a small world of general knowledge.",
)
app.command(
    "veneer.cli.bases:quantize",
    group=WRITE,
    help="Quantize MODEL into the directory OUT, which is then a base that stays on disk while in "
    "use.",
)
app.command(
    "veneer.cli.merge:merge",
    group=WRITE,
    synonym=("fuse", "merge-lora"),
    help="Bake ADAPTER into BASE, compare, and write a plain model to OUT.",
)
app.command(
    "veneer.cli.convert:convert",
    group=WRITE,
    help="Write ADAPTER in another format, and say exactly what was folded or approximated for it; "
    "or a model's directory as GGUF.",
)
app.command(
    "veneer.cli.export:export",
    group=WRITE,
    help="Write the adapter of a run to OUT: of its newest checkpoint where it has not ended, of "
    "any step, or the best so far.",
)
app.command(
    "veneer.cli.push:push",
    group=WRITE,
    help="Give ADAPTER to the hub as NAME, with a card that says what was measured; --dry-run "
    "writes what would be given. Every command takes hf:NAME as an adapter.",
)
app.command(
    "veneer.cli.push:card",
    group=INSPECT,
    help="Print the card of ADAPTER: what it is, its data's hash, its recipe, what its run "
    "measured, the licence of its base.",
)
app.command(
    "veneer.cli.check:check",
    group=INSPECT,
    help="Read ADAPTER as another runtime would, and say what it needs there; exit code 0 if it "
    "will load.",
)
app.command(
    "veneer.cli.doctor:doctor",
    group=INSPECT,
    help="Show what this machine is and how fast it computes, what will be fast here and what not, "
    "why, and what to do: a report without private data.",
)
app.command(
    "veneer.cli.verify:verify",
    group=INSPECT,
    help="Compare files of adapters, checkpoints, models and whole runs with their checksums; exit "
    "code 0 if all are as they were written.",
)
app.command(
    "veneer.cli.evaluate:evaluate",
    group=INSPECT,
    synonym=("eval", "lm-eval", "benchmark"),
    help="Evaluate MODEL with adapters on tasks of EleutherAI's harness, or on who answers prompts "
    "better.",
)
app.command(
    "veneer.cli.chat:generate",
    group=ANSWER,
    synonym=("inference", "infer", "run"),
    help="Print MODEL's answer to PROMPT, or to each prompt of a file as JSON lines.",
)
app.command(
    "veneer.cli.chat:chat",
    group=ANSWER,
    help="Talk with MODEL; an empty line or Ctrl-D ends it.",
)
app.command(
    "veneer.cli.serve:serve",
    group=ANSWER,
    help="Serve MODEL and any number of adapters over it: OpenAI's protocol, and a page.",
)
app.command(
    "veneer.cli.completion:completion",
    group=HELP,
    help="Print what lets SHELL (bash, zsh or fish) complete commands, flags and their values.",
)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        with warnings_as_notices():
            code = guided() if not arguments and is_at_terminal() else _called(arguments)
    except (VeneerError, CycloptsError, OSError) as error:
        error = storage_error(error) or error  # where nobody has said what was being written
        show_error(_explained(error, arguments))
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        ERRORS.print("Interrupted.")
        return 130
    return code or 0


def guided() -> int:
    """Lead a person from nothing to a chat, by command lines."""
    from veneer.cli.guide import guide

    return guide(run)


def _called(arguments: Sequence[str]) -> int | None:
    return app(
        joined_data(arguments),
        console=Console(),  # of this call: cyclopts would keep an earlier one's width
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
    )


def _explained(error: Exception, arguments: Sequence[str]) -> Exception:
    """Return an error of the command line with what to write instead, where that is known."""
    from veneer.cli.other_names import our_name, with_commas

    advice = None
    if isinstance(error, UnknownOptionError):
        flags = [name for argument in error.argument_collection for name in argument.names]
        advice = our_name(error.token.keyword or error.token.value, flags)
    elif isinstance(error, UnusedCliTokensError):
        unused = error.unused_tokens or ()
        advice = with_commas(arguments, unused) or data_flags(arguments, unused)
    elif isinstance(error, CoercionError) and get_origin(error.target_type) is dict and error.token:
        advice = our_name(error.token.keyword or "", ("--budget", "--lr"))  # no rate of its own
    elif (
        isinstance(error, CoercionError)
        and error.token
        and (choices := _choices(error.target_type))
    ):
        where = f" from {error.token.source}" if error.token.source not in ("", "cli") else ""
        advice = (
            f'Invalid value "{error.token.value}" for {error.token.keyword}{where}. Choose from: '
            f"{', '.join(map(str, choices))}"
        )
    elif isinstance(error, MissingArgumentError) and error.argument and not error.keyword:
        argument = error.argument
        name = argument.name
        if argument.field_info.is_positional:
            name = name.lstrip("-").replace("-", "_").upper()
        advice = f"{name} is missing. {(argument.parameter.help or '').rstrip('.')}"
        if values := argument.get_choices():
            advice += f": {', '.join(values)}"
    return ConfigError(f"{advice}.") if advice else error


def _choices(kind: Any) -> tuple[Any, ...]:
    """Return the values of a union of choices, of which cyclopts shows the type; else nothing."""
    kinds = [member for member in get_args(kind) if member is not NoneType]
    if get_origin(kind) not in (Union, UnionType) or any(get_origin(x) != Literal for x in kinds):
        return ()
    return tuple(value for member in kinds for value in get_args(member))
