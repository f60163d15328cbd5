"""`veneer serve` on the terminal: load, say where to look, and end properly."""

from __future__ import annotations

import os
from typing import Annotated

from cyclopts import Parameter
from rich.markup import escape

from veneer.cli.console import OUTPUT, quieten_libraries, show_notice
from veneer.cli.flags import BaseFlags, Flat, NamedModel
from veneer.cli.loading import base_of, load_base
from veneer.errors import VeneerError, listed
from veneer.serve.config import KeyFiles, ServeConfig

SHOWN_NAMES = 12


def serve(
    model: NamedModel = None,
    /,
    *,
    adapter: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            help="NAME=DIRECTORY: serve this adapter; may be given repeatedly. One that cannot be "
            "served is an error; one below --adapters-dir is left out with a note.",
        ),
    ] = None,
    settings: Annotated[ServeConfig, Flat] = ServeConfig(),
    loading: Annotated[BaseFlags, Flat] = BaseFlags(),
) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    keys = KeyFiles(settings, os.environ)
    quieten_libraries()
    try:
        from veneer.serve import run
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
            raise
        raise VeneerError("veneer serve needs: pip install 'veneer[serve]'") from error
    with run.listen(settings) as listener:
        paths = run.find_adapters(adapter or [], settings.adapters_dir, "")
        base = load_base(base_of(model, paths.values()), loading, paths)
        for at in run.serve(base, adapter or [], settings, keys=keys, listener=listener):
            for notice in at.notices:
                show_notice(notice)
            OUTPUT.print(f"[bold]Base[/]      {escape(at.base)}")
            names = listed(at.adapters, most=SHOWN_NAMES) or "none"
            OUTPUT.print(f"[bold]Adapters[/]  {escape(names)}")
            where = f"{at.url} (the page), {at.url}/v1 (OpenAI's protocol)"
            OUTPUT.print(f"[bold]Serving[/]   {where}")
    OUTPUT.print("Ended.")
