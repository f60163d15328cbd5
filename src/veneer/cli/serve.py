"""`veneer serve` on the terminal: load, say where to look, and end properly."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.markup import escape

from veneer.cli.commands import load_named
from veneer.cli.console import ERRORS, OUTPUT, quieten_libraries
from veneer.errors import VeneerError, listed
from veneer.quant.settings import Bits
from veneer.serve.config import ServeConfig, read_keys

SHOWN_NAMES = 12


def run_serve(
    model: str,
    adapters: Sequence[str],
    config: ServeConfig,
    *,
    dtype: str,
    bits: Bits | None,
) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    keys = read_keys(config, os.environ)
    quieten_libraries()
    try:
        from veneer.serve.run import listen, serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client"):
            raise
        raise VeneerError("veneer serve needs: pip install 'veneer[serve]'") from error
    with listen(config) as listener:
        base = load_named(model, {}, dtype=dtype, bits=bits)
        for at in serve(base, adapters, config, keys=keys, listener=listener):
            for notice in at.notices:
                ERRORS.print(f"  [yellow]note[/] {escape(notice)}")
            OUTPUT.print(f"[bold]Base[/]      {escape(at.base)}")
            names = listed(at.adapters, most=SHOWN_NAMES) or "none"
            OUTPUT.print(f"[bold]Adapters[/]  {escape(names)}", soft_wrap=True)
            where = f"{at.url} (the page), {at.url}/v1 (OpenAI's protocol)"
            OUTPUT.print(f"[bold]Serving[/]   {where}", soft_wrap=True)
    OUTPUT.print("Ended.")
