"""`veneer doctor`: what this machine is, how fast it computes, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.markup import escape

from veneer.cli.console import OUTPUT, bytes_text, show_doing
from veneer.cli.flags import Switch
from veneer.doctor.facts import Facts, facts
from veneer.doctor.report import plain, without_private

if TYPE_CHECKING:
    from veneer.doctor.advice import Remark
    from veneer.doctor.measure import Figures, Speed

HEADINGS = {"fast": "Fast here", "slow": "Slow here", "do": "What to do"}
COLOURS = {"fast": "green", "slow": "yellow", "do": "bold"}
INDENT = 12  # columns of a line's title
MOST_NARROW = 20  # columns of what is beside it


def doctor(
    *,
    as_json: Annotated[
        Switch, Parameter(name="--json", help="Print one object of JSON instead, for programs.")
    ] = False,
) -> None:
    """Print what is known at once, then measure, then say what follows. Nothing private is shown,
    so that the output can be part of a report."""
    here = facts()
    if not as_json:
        _show(dict(_known(here)))
    show_doing("Measuring for about two seconds")
    from veneer.doctor.advice import remarks
    from veneer.doctor.measure import measure  # imports torch

    figures = measure(here.place)
    advice = remarks(here, figures)
    if as_json:
        print(json.dumps(plain({"facts": here, "figures": figures, "remarks": advice})))
        return
    _show(dict(_measured(figures)))
    _show_remarks(advice)


def _show(lines: Mapping[str, str]) -> None:
    for title, text in lines.items():
        _show_hanging(title, text, style="bold")


def _show_hanging(title: str, text: str, *, style: str) -> None:
    """Print a title and a text whose further lines begin below its first one."""
    width = max(MOST_NARROW, OUTPUT.width - INDENT)
    lines = wrap(without_private(text), width, break_long_words=False, break_on_hyphens=False)
    for first, line in zip([title, *[""] * len(lines)], lines, strict=False):
        shown = f"[{style}]{first}[/]" + " " * (INDENT - len(first)) if first else " " * INDENT
        OUTPUT.print(shown + escape(line))


def _show_remarks(advice: list[Remark]) -> None:
    before = None
    for remark in advice:
        title = "" if remark.kind == before else HEADINGS[remark.kind]
        if title:
            OUTPUT.print()
        _show_hanging(title, remark.text, style=COLOURS[remark.kind])
        before = remark.kind


def _known(here: Facts) -> Iterator[tuple[str, str]]:
    yield "System", here.system
    units = ", ".join(here.processor.units) or "none that is known"
    yield "Processor", f"{here.processor.name}; {units}"
    cores = here.cores
    given = f"{cores.allowed} of {cores.machine}"
    if cores.quota is not None:
        given += f", {cores.quota:g} at a time (control group)"
    if here.load is not None:
        given += f"; load {here.load:.1f}"
    yield "Cores", given
    if here.memory is not None and here.free is not None:
        yield "Memory", f"{bytes_text(here.free)} free of {bytes_text(here.memory)}"
    yield "Disk", f"{bytes_text(here.disk_free)} free at {here.place}"
    yield "Versions", ", ".join(f"{name} {text}" for name, text in here.versions.items())
    whole = [extra for extra, lacks in here.missing.items() if not lacks]
    if here.missing:
        yield "Extras", ", ".join(whole) or "none"
    lacking = (f"{extra} ({', '.join(lacks)})" for extra, lacks in here.missing.items() if lacks)
    if absent := ", ".join(lacking):
        yield "Not here", absent
    if here.environment:
        yield "Set", ", ".join(f"{name}={text}" for name, text in here.environment.items())


def _measured(figures: Figures) -> Iterator[tuple[str, str]]:
    yield "Compiler", figures.compiler or "none"
    yield "Kernels", figures.native or "compiled"
    cores = "1 thread" if figures.threads == 1 else f"{figures.threads} threads"
    yield "Products", f"{_speeds(figures.products)} ({cores})"
    yield "Memory", f"{bytes_text(figures.copied)}/s copied"
    if figures.written is not None:
        read = "" if figures.read is None else f", {bytes_text(figures.read)}/s read"
        yield "Disk", f"{bytes_text(figures.written)}/s written{read}"
    if card := figures.card:
        free = "" if card.memory_free is None else f", {bytes_text(card.memory_free)} free"
        yield "GPU", f"{card.name}{free}; {_speeds(card.products)}; {bytes_text(card.sent)}/s sent"
    else:
        yield "GPU", "none"


def _speeds(speed: Speed) -> str:
    return f"float32 {_flops(speed.float32)}, bf16 {_flops(speed.bf16)}"


def _flops(count: float) -> str:
    return f"{count / 1e12:.1f} TFLOP/s" if count >= 1e12 else f"{count / 1e9:.1f} GFLOP/s"
