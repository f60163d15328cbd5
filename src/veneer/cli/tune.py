"""`veneer tune`: run a recipe, show the run as it goes, then draw it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.markup import escape

import veneer
from veneer.adapter.config import LoRA
from veneer.adapter.method import Method
from veneer.cli.console import (
    ERRORS,
    OUTPUT,
    quieten_libraries,
    show_command,
    show_notice,
    silenced,
)
from veneer.cli.events import events_on_stdout
from veneer.cli.flags import (
    AsJson,
    BaseFlags,
    Loaded,
    LoRAFlags,
    MethodFlags,
    Model,
    ObjectiveFlags,
    OffloadBase,
    OnPolicyFlags,
    PackHead,
    RowFlags,
    Switch,
    TrainFlags,
    refuse_preset,
)
from veneer.cli.loading import bits_of
from veneer.cli.plots import draw_losses
from veneer.cli.progress import RunDisplay
from veneer.cli.several_data import data_of
from veneer.errors import ConfigError, DivergedError, VeneerError
from veneer.objectives.config import ANSWERS, Objective
from veneer.objectives.policy_config import OnPolicy
from veneer.quant.settings import Offload
from veneer.run_directory import DEFAULT_OUT, RunDirectory
from veneer.training.config import TOKENS_PER_PASS, TrainConfig
from veneer.training.events import Event, Started, Stopped, Verdict
from veneer.training.recipe import DataConfig, Recipe, Shard
from veneer.training.tracking.choice import trackers
from veneer.training.tracking.tracked import tracked

if TYPE_CHECKING:
    from veneer.processes.world import World
MOST_GRACE = 10**6  # seconds: timers of the system take no number at will
DATA_HELP = (
    "Rows to learn: .jsonl, .json, .csv, .parquet, .txt, a directory, a pattern, or hf:NAME of a "
    "data set. Several, perhaps with shares: --data a.jsonl:0.7 --data b:0.3."
)


def tune(
    model: Model,
    data: Annotated[str | None, Parameter(help=DATA_HELP)] = None,
    *,
    method: Annotated[Method, MethodFlags] = Method(),
    lora: Annotated[LoRA, LoRAFlags] = LoRA(),
    training: Annotated[TrainConfig, TrainFlags] = TrainConfig(),
    objective: Annotated[Objective, ObjectiveFlags] = ANSWERS,
    on_policy: Annotated[OnPolicy, OnPolicyFlags] = OnPolicy(),
    rows: Annotated[DataConfig, RowFlags] = DataConfig(),
    base: Annotated[BaseFlags, Loaded] = BaseFlags(),
    pack_head: Annotated[PackHead, Parameter(group=Loaded.group)] = False,
    out: Annotated[Path, Parameter(help="Directory for the results.")] = DEFAULT_OUT,
    start_from: Annotated[
        Path | None,
        Parameter(
            name="--from",
            help="Start from this adapter, of any format, with its settings, and not anew.",
        ),
    ] = None,
    jobs: Annotated[
        Any,  # a path, of which `from_recipe` makes the arguments of each job by its name
        Parameter(
            help="File of several runs (jobs.yaml) to train at the same time over one base, each "
            "below --out: a list under jobs:, in which each has a name and flags of its own."
        ),
    ] = None,
    search_first: Annotated[
        Any,  # the settings that are "auto", which `from_recipe` makes of their flags
        Parameter(show=False),
    ] = (),
    tokens_per_pass: Annotated[
        int,
        Parameter(help="With --jobs, real tokens of a pass that several of them share, at most."),
    ] = TOKENS_PER_PASS,
    config: Annotated[
        Path | None, Parameter(help="Recipe of an earlier run; flags on this line override it.")
    ] = None,
    resume: Annotated[Switch, Parameter(help="Go on from the newest checkpoint in --out.")] = False,
    force: Annotated[
        Switch,
        Parameter(help="Replace an earlier run in --out, and take --from of another base."),
    ] = False,
    ignore_plan: Annotated[
        Switch, Parameter(help="Go ahead even where less memory or disk is free than is planned.")
    ] = False,
    grace_seconds: Annotated[
        float | None,
        Parameter(
            help="Seconds that a scheduler gives after SIGTERM: the run ends by then, with a "
            "checkpoint where its step ends in time."
        ),
    ] = None,
    track: Annotated[
        tuple[str, ...],
        Parameter(
            help="Give the run's numbers to a tracker: tensorboard, mlflow or wandb, perhaps with "
            "a place: tensorboard:DIRECTORY, mlflow:DIRECTORY or address, wandb:PROJECT. May be "
            "given several times.",
            negative=(),
            show_default=False,
        ),
    ] = (),
    tensorboard: Annotated[Switch, Parameter(help="Short for --track tensorboard.")] = False,
    shard: Annotated[
        Shard,
        Parameter(
            help="What each of several processes holds only a part of: nothing (none); the frozen "
            "base, gathered block by block (base); or the base where it does not fit whole (auto)."
        ),
    ] = "auto",
    offload: Annotated[OffloadBase, Parameter(group=Loaded.group)] = "none",
    processes: Annotated[
        int | None,
        Parameter(help="Train in this many processes of this machine, one for each GPU."),
    ] = None,
    quiet: Annotated[Switch, Parameter(help="Print only errors.")] = False,
    as_json: AsJson = False,
) -> int:
    """Return an exit code, as run_recipe does. `config` is read before this is called."""
    refuse_preset(model)
    if grace_seconds is not None and not 0 < grace_seconds <= MOST_GRACE:
        raise ConfigError(
            f"--grace-seconds must be above 0 and at most {MOST_GRACE}, not {grace_seconds:g}."
        )
    options: dict[str, Any] = {
        "resume": resume,
        "force": force,
        "ignore_plan": ignore_plan,
        "track": (*track, "tensorboard") if tensorboard else track,
        "quiet": quiet,
        "as_json": as_json,
    }
    if grace_seconds is not None:
        options["grace_seconds"] = grace_seconds
    if jobs is not None:
        from veneer.cli.many import recipes_of, run_jobs

        if processes is not None:
            raise ConfigError("--jobs trains in one process; leave out --processes.")
        recipes = recipes_of(jobs, out, recipe_of)
        searches = {name: arguments.get("search_first", ()) for name, arguments in jobs.items()}
        options["tokens_per_pass"] = tokens_per_pass
        return run_jobs(recipes, out, searches=searches, **options)
    if tokens_per_pass != TOKENS_PER_PASS:
        raise ConfigError("--tokens-per-pass is for --jobs; for a run alone: --tokens-per-batch.")
    if data is None:
        raise ConfigError(f"DATA is missing. {DATA_HELP}")
    recipe = recipe_of(
        model=model,
        data=data,
        method=method,
        lora=lora,
        training=training,
        objective=objective,
        on_policy=on_policy,
        rows=rows,
        base=base,
        pack_head=pack_head,
        shard=shard,
        offload=offload,
        out=out,
        start_from=start_from,
    )
    if search_first:
        from veneer.cli.trials import search_before

        if processes is not None:
            raise ConfigError("auto searches in one process; leave out --processes.")
        settled = search_before(recipe, search_first, **options)
        if isinstance(settled, int):
            return settled
        recipe = settled
    if processes is None:
        return run_recipe(recipe, **options)
    if processes < 1:
        raise ConfigError(f"--processes must be at least 1, not {processes}.")
    from veneer.cli.company import show_stopping
    from veneer.processes.launch import launch

    work = partial(run_recipe, recipe, shows_signals=False, **options)
    return launch(processes, work, on_signal=show_stopping)


def recipe_of(
    *,
    model: str,
    data: str,
    out: Path,
    method: Method = Method(),
    lora: LoRA = LoRA(),
    training: TrainConfig = TrainConfig(),
    objective: Objective = ANSWERS,
    on_policy: OnPolicy = OnPolicy(),
    rows: DataConfig = DataConfig(),
    base: BaseFlags = BaseFlags(),
    pack_head: bool = False,
    shard: Shard = "auto",
    offload: Offload = "none",
    start_from: Path | None = None,
) -> Recipe:
    """Return the recipe of a command line, or of a job, by the arguments of `tune`."""
    bits = base.bits
    if bits == "auto":
        bits, has_head = bits_of(model, {} if start_from is None else {"--from": start_from})
        pack_head = pack_head or has_head
    return Recipe(
        model=model,
        data=data_of(str(data)),
        method=method,
        lora=lora,
        training=training,
        objective=objective,
        on_policy=on_policy,
        rows=rows,
        device=base.device,
        dtype=base.dtype,
        bits=bits,
        pack_head=pack_head,
        shard=shard,
        offload=offload,
        out=out,
        start_from=start_from,
    )


def run_recipe(
    recipe: Recipe,
    place: Path | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    ignore_plan: bool = False,
    grace_seconds: float | None = None,
    track: Sequence[str] = (),
    quiet: bool = False,
    as_json: bool = False,
    shows_signals: bool = True,
) -> int:
    """Run a recipe to its end and return the exit code: 0, 3 when it diverged, 130 after Ctrl-C,
    143 after SIGTERM, 129 after SIGHUP. Of several processes, which torchrun or `--processes`
    started, one prints.

    place: by which the processes of `--processes` find each other.
    """
    from veneer.cli.company import as_one, goes_on
    from veneer.processes.outcome import noted_outcome
    from veneer.processes.start import joined

    if (code := noted_outcome()) is not None:
        return code
    with joined(place, accelerators=recipe.device != "cpu") as company:
        writes = company.world.writes

        def run() -> int:
            return show_run(
                recipe,
                company.world,
                resume=resume or goes_on(company.world, RunDirectory(recipe.out)),
                force=force,
                ignore_plan=ignore_plan,
                grace_seconds=grace_seconds,
                track=track if writes else (),
                quiet=quiet or not writes,
                as_json=as_json and writes,
                shows_signals=shows_signals and writes,
            )

        return as_one(company, run) if place or company.world.size > 1 else run()


def show_run(
    recipe: Recipe,
    world: World,
    *,
    resume: bool,
    force: bool,
    ignore_plan: bool,
    grace_seconds: float | None,
    track: Sequence[str],
    quiet: bool,
    as_json: bool,
    shows_signals: bool,
) -> int:
    """Run a recipe in this process, show it unless `quiet`, and return the exit code."""
    from veneer.cli.company import interruptible
    from veneer.processes.start import launch_id

    code = 0
    quieten_libraries()
    display = None if quiet else RunDisplay()
    directory = RunDirectory(recipe.out)
    receivers = trackers(track, recipe.out) if track else []
    with (
        events_on_stdout(as_json) as write,
        interruptible(shows=shows_signals, grace=grace_seconds) as asked,
        display or nullcontext(),
    ):
        if display:
            OUTPUT.print(f"[bold]Base[/]    {escape(recipe.model)}")
        events: Iterator[Event] = veneer.tune(
            recipe, resume=resume, force=force, ignore_plan=ignore_plan, should_stop=asked
        )
        if receivers:
            events = tracked(events, receivers, recipe.settings())
        for event in events:
            write(event)
            if display:
                with silenced():
                    display.show(event)
            if isinstance(event, Started) and world.writes and (launch := launch_id()):
                directory.write_launch(launch)
            if isinstance(event, Verdict) and event.kind == "diverged":
                code = DivergedError.exit_code
                if quiet:
                    show_notice(event.text)
            if isinstance(event, Stopped) and event.reason == "interrupted":
                if world.writes:
                    show_ways_on(recipe)
                return 128 + world.most(asked.number)
    if not world.writes:
        return code
    try:
        draw_losses(directory.read_metrics(), directory.picture)
    except VeneerError as error:
        show_notice(str(error))
    return code


def show_ways_on(recipe: Recipe) -> None:
    """Print what can be done with a run that was stopped."""
    out = recipe.out
    ERRORS.print(
        f"Go on with the same command and --resume (results in {escape(str(out))}). Or try what is "
        "learnt so far, or write it as an adapter:"
    )
    show_command(f"veneer generate PROMPT --adapter {quote(str(out))}", on=ERRORS)
    show_command(f"veneer export {quote(str(out))}", on=ERRORS)
