"""`veneer card` and `veneer push`: an adapter described, and given to the hub."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.markup import escape

from veneer.cli.console import (
    OUTPUT,
    quieten_libraries,
    refuse_to_replace,
    show_command,
    show_doing,
    show_notice,
    show_saved,
)
from veneer.cli.flags import AdapterFormat, AnyAdapter, Switch
from veneer.errors import ConfigError
from veneer.files import write_text

if TYPE_CHECKING:
    from veneer.formats.state import AdapterState

README = "README.md"
Licence = Annotated[
    str | None,
    Parameter(help="Licence of the base, where no card beside the base says it."),
]


def card(
    adapter: AnyAdapter,
    /,
    *,
    licence: Licence = None,
    out: Annotated[Path | None, Parameter(help="File for the card; else it is printed.")] = None,
) -> None:
    """Print the card and nothing else, so that it can be redirected, or write it."""
    from veneer.formats import card as cards

    quieten_libraries()
    text = cards.card(_known(adapter, licence))
    if out is None:
        print(text)
    elif out.exists():
        raise ConfigError(f"{out} is there already; name another place.")
    else:
        write_text(out, text)
        show_saved(out, what="card")


def push(
    adapter: AnyAdapter,
    name: Annotated[str, Parameter(help="Its name on the hub: USER/NAME.")],
    /,
    *,
    base: Annotated[
        str | None,
        Parameter(help="The base's name on the hub, where the adapter's files name another."),
    ] = None,
    licence: Licence = None,
    format: AdapterFormat = "peft",
    private: Annotated[Switch, Parameter(help="Let only you and yours see it.")] = False,
    dry_run: Annotated[
        Path | None,
        Parameter(help="Write what would be pushed into this directory, and push nothing."),
    ] = None,
) -> None:
    """Say what is in the repository, and where it is."""
    from veneer.formats import card as cards
    from veneer.formats import hub
    from veneer.formats.adapters import write

    quieten_libraries()
    hub.check_name(name)
    if dry_run is not None:
        refuse_to_replace(dry_run)
    state = _known(adapter, licence)
    state = replace(
        state,
        training=cards.without_places(state.training),
        base_name=cards.without_places(base or state.base_name),
    )
    if state.hub_name.count("/") != 1 or state.hub_name.startswith("."):
        show_notice(
            f"The base is called {state.hub_name or 'nothing'}, which is nowhere on the hub: who "
            "pulls the adapter has to name the base. --base OWNER/MODEL gives it its name there."
        )
    with tempfile.TemporaryDirectory() as scratch:
        place = dry_run or Path(scratch) / "adapter"
        for note in write(state, place, format=format):
            show_notice(note)
        if not (place / README).exists():  # PEFT's has one
            write_text(place / README, cards.card(state))
        if dry_run is not None:
            show_saved(place, what="what would be pushed")
            return
        show_doing(f"Pushing to {name}")
        address = hub.push(place, name, private=private, message="Add an adapter of Veneer")
    OUTPUT.print(f"[bold]Pushed[/]  {escape(address)}")
    OUTPUT.print("Use it:")
    show_command(f"veneer generate PROMPT --adapter hf:{name}")


def _known(adapter: Path, licence: str | None) -> AdapterState:
    """Return an adapter, with what its run measured and the licence of its base, if known."""
    from veneer.formats.adapters import read
    from veneer.formats.locate import locate
    from veneer.formats.measured import licence_of, measured, run_of

    place = locate(adapter).path
    state = read(place)
    about: dict[str, Any] = {**state.training}
    if run := run_of(place):
        about["figures"] = measured(run)
    if licence := licence or about.get("licence") or licence_of(state.base_name):
        about["licence"] = licence
    else:
        show_notice("The licence of the base is not known here; --licence says it.")
    return replace(state, training=about)
