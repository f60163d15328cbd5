"""`veneer search`: try settings over one base, and show the trials and what came of them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

from cyclopts import Parameter
from rich.markup import escape

import veneer
from veneer.adapter.config import LoRA
from veneer.cli.console import (
    ERRORS,
    OUTPUT,
    new_table,
    print_wide,
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
    Model,
    ObjectiveFlags,
    OffloadBase,
    PackHead,
    RowFlags,
    SearchFlags,
    Switch,
    TrainFlags,
    refuse_preset,
)
from veneer.cli.plots import draw_losses
from veneer.cli.response import draw_response
from veneer.cli.trials import SearchDisplay
from veneer.errors import ConfigError, VeneerError
from veneer.objectives.config import ANSWERS, Objective
from veneer.run_directory import RunDirectory
from veneer.training.config import TOKENS_PER_PASS, TrainConfig
from veneer.training.recipe import DataConfig
from veneer.training.search.config import SearchConfig
from veneer.training.search.result import (
    PICTURE,
    TABLE,
    Searched,
    SearchResult,
    TrialEnded,
    ending,
)
from veneer.training.search.space import in_words

SHOWN = 10  # of the trials, in the table at the end


def search(
    model: Model,
    data: Annotated[str, Parameter(help="Rows to learn, in any form that veneer tune takes.")],
    *,
    over: Annotated[
        tuple[str, ...],
        Parameter(
            help="A setting to vary, by the name of tune's flag, with a range or values: --over "
            "lr=1e-4..3e-3 --over rank=4,8,16,64 --over targets=attention,q_proj+v_proj,all.",
            negative=(),
            show_default=False,
            group=SearchFlags.group,
        ),
    ] = (),
    settings: Annotated[SearchConfig, SearchFlags] = SearchConfig(),
    lora: Annotated[LoRA, LoRAFlags] = LoRA(),
    training: Annotated[TrainConfig, TrainFlags] = TrainConfig(),
    objective: Annotated[Objective, ObjectiveFlags] = ANSWERS,
    rows: Annotated[DataConfig, RowFlags] = DataConfig(),
    base: Annotated[BaseFlags, Loaded] = BaseFlags(),
    pack_head: Annotated[PackHead, Parameter(group=Loaded.group)] = False,
    offload: Annotated[OffloadBase, Parameter(group=Loaded.group)] = "none",
    out: Annotated[Path, Parameter(help="Directory for the results.")] = Path("dist/search"),
    start_from: Annotated[
        Path | None, Parameter(name="--from", help="Start each trial from this adapter.")
    ] = None,
    tokens_per_pass: Annotated[
        int, Parameter(help="Real tokens of a pass that several trials share, at most.")
    ] = TOKENS_PER_PASS,
    config: Annotated[
        Path | None,
        Parameter(
            help="Recipe of a run, whose settings trials have beside what varies; flags on this "
            "line override it."
        ),
    ] = None,
    resume: Annotated[Switch, Parameter(help="Go on with the search in --out.")] = False,
    force: Annotated[Switch, Parameter(help="Replace an earlier search in --out.")] = False,
    ignore_plan: Annotated[
        Switch, Parameter(help="Go ahead even where less memory or disk is free than is planned.")
    ] = False,
    quiet: Annotated[Switch, Parameter(help="Print only errors.")] = False,
    as_json: AsJson = False,
) -> int:
    """Return 0; 2 where no trial came to its end; 130 after Ctrl-C, 143 after SIGTERM."""
    from veneer.cli.company import interruptible  # which imports torch
    from veneer.cli.tune import recipe_of  # a command of its own

    refuse_preset(model)
    recipe = recipe_of(
        model=model,
        data=data,
        lora=lora,
        training=training,
        objective=objective,
        rows=rows,
        base=base,
        pack_head=pack_head,
        offload=offload,
        out=out,
        start_from=start_from,
    )
    varied = spaces(over)
    quieten_libraries()
    display = None if quiet else SearchDisplay()
    result: SearchResult | None = None
    with (
        events_on_stdout(as_json) as write,
        interruptible() as asked,
        display or nullcontext(),
    ):
        for name, event in veneer.search(
            recipe,
            varied,
            settings,
            resume=resume,
            force=force,
            ignore_plan=ignore_plan,
            tokens_per_pass=tokens_per_pass,
            should_stop=asked,
        ):
            write(event, trial=name)
            if isinstance(event, Searched):
                result = event.result
            elif isinstance(event, TrialEnded) and event.why:
                show_notice(f"trial {event.trial.number}: {event.why}")
            if display:
                with silenced():
                    display.show(name, event)
        assert result is not None
        _draw(result, out)
        if display:
            show_result(result, out)
    if asked.number:
        ERRORS.print(f"Go on with the same command and --resume (results in {escape(str(out))}).")
        return 128 + asked.number
    if result.best is None:
        raise VeneerError(
            f"No trial came to its end with a finite loss; each one's is in {out / TABLE}. Try "
            "lower learning rates."
        )
    return 0


def spaces(over: tuple[str, ...]) -> dict[str, str]:
    """Return what each --over says, by its setting. Raises ConfigError for all that say nothing."""
    by_name: dict[str, str] = {}
    problems = []
    for text in over:
        name, equals, spec = text.partition("=")
        if not (name and equals and spec):
            problems.append(f"{text!r} must be SETTING=A..B or SETTING=A,B,C")
        elif name in by_name:
            problems.append(f"{name} is given twice")
        by_name[name] = spec
    if problems:
        raise ConfigError(f"--over cannot be followed: {'; '.join(problems)}.")
    return by_name


def show_result(result: SearchResult, out: Path) -> None:
    """Print the best trials, what the search cost, and how to go on from the best."""
    names = list(dict.fromkeys(name for trial in result.trials for name in trial.values))
    table = new_table("trial", *names, "evaluation loss", "steps", "")
    for trial in result.trials[:SHOWN]:
        values = [escape(_text(trial.values.get(name, ""))) for name in names]
        loss = "-" if trial.loss is None else f"{trial.loss:.4f}"
        steps = f"{trial.steps:,}/{trial.all_steps:,}"
        table.add_row(str(trial.number), *values, loss, steps, ending(trial))
    print_wide(table)
    if len(result.trials) > SHOWN:
        OUTPUT.print(f"  and {len(result.trials) - SHOWN} others, in {escape(str(out / TABLE))}")
    OUTPUT.print(f"[bold]Cost[/]    {result.cost}.")
    if result.best is not None:
        OUTPUT.print(
            f"[bold]Best[/]    {escape(in_words(result.best.values))}: its adapter and recipe are "
            f"in {escape(str(out))}. Merge it, or train so again:"
        )
        show_command(f"veneer merge MODEL {quote(str(out))} MERGED")
        recipe = RunDirectory(out).recipe
        show_command(f"veneer tune --config {quote(str(recipe))} --out ELSEWHERE")


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _draw(result: SearchResult, out: Path) -> None:
    run = RunDirectory(out)
    try:
        draw_response(result, out / PICTURE)
        if result.best is not None:
            draw_losses(run.read_metrics(), run.picture)
    except VeneerError as error:
        show_notice(str(error))
