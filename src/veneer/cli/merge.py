"""veneer merge: a plain model, with the certificate that it says what was learnt."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

import veneer
from veneer.cli.commands import load_adapted
from veneer.cli.console import OUTPUT, bytes_text, quieten_libraries
from veneer.cli.tables import merge_lines, merge_table, merged_table
from veneer.data.sources import files_of
from veneer.errors import MergeError, VeneerError
from veneer.files import size_of
from veneer.formats.adapters import read as read_adapter
from veneer.formats.gguf.model import kept_of, write_merged
from veneer.models.load import load_skeleton
from veneer.models.locate import locate
from veneer.quant.settings import Bits


def run_merge(
    base: str,
    adapter: Path,
    out: Path,
    *,
    dtype: str,
    bits: Bits | None,
    probe: Path | None,
    accept_loss: bool,
    force: bool,
    allow_bin: bool,
) -> None:
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise VeneerError(f"{out} holds something already; name another place.")
    if probe is not None:
        files_of(probe)  # a wrong name shows before the work
    loaded = load_adapted(base, adapter, dtype=dtype, bits=bits, force=force, allow_bin=allow_bin)
    plain = veneer.merge(loaded.model)
    report = veneer.certify(loaded.model, plain, loaded.tokenizer, probe=probe)
    OUTPUT.print(merge_table(report))
    for line in merge_lines(report):
        OUTPUT.print(f"  {line}", soft_wrap=True)
    try:
        report.check()
    except MergeError as error:
        if not accept_loss:
            raise MergeError(f"{error} Or write it as it is: --accept-loss.") from error
        OUTPUT.print(f"  [yellow]note[/] {escape(str(error))}", soft_wrap=True)
    veneer.write_model(plain, loaded.tokenizer, out)
    OUTPUT.print(f"Merged model: {escape(str(out))} ({bytes_text(size_of(out))})", soft_wrap=True)


def run_merge_gguf(
    base: str, adapter: Path, out: Path, *, kind: str | None, force: bool, allow_bin: bool
) -> None:
    quieten_libraries()
    if out.exists():
        raise VeneerError(f"{out} is there already; name another place.")
    place = locate(base)
    if not isinstance(place, Path) or place.suffix != ".gguf":
        raise VeneerError(f"{out} can be made of a .gguf base only, and {base} is none.")
    state = read_adapter(adapter, load_skeleton(base), allow_bin=allow_bin)
    stored = write_merged(place, state, out, kind=kind, force=force)
    OUTPUT.print(merged_table(stored))
    OUTPUT.print(
        f"Merged model: {escape(str(out))} ({bytes_text(out.stat().st_size)}); "
        f"{kept_of(stored):.1%} of the adapter's change is left",
        soft_wrap=True,
    )
