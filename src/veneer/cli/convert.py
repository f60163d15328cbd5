"""`veneer convert`: an adapter in another format, and what was changed for it."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from veneer.cli.console import OUTPUT, bytes_text, quieten_libraries
from veneer.errors import ConfigError
from veneer.files import size_of
from veneer.formats.convert import convert
from veneer.formats.names import FormatName
from veneer.models.load import load_skeleton


def run_convert(
    adapter: Path,
    out: Path,
    *,
    to: FormatName,
    base: str | None,
    alpha: float | None,
    enable_lora: str | None,
    rank: int | None,
    approximate: bool,
    force: bool,
    allow_bin: bool,
) -> None:
    quieten_libraries()
    done = convert(
        adapter,
        out,
        to=to,
        base=load_skeleton(base) if base else None,
        base_name=base or "",
        alpha=alpha,
        enable_lora=_parts(enable_lora),
        rank=rank,
        approximate=approximate,
        force=force,
        allow_bin=allow_bin,
    )
    for note in done.notes:
        OUTPUT.print(f"  [yellow]note[/] {escape(note)}", soft_wrap=True)
    size = size_of(out)
    layers = f"{done.layers} layer{'' if done.layers == 1 else 's'}"
    OUTPUT.print(
        f"[bold]Saved[/]   {escape(str(out))} ({to}, {layers}, {bytes_text(size)}; "
        f"from {done.source})",
        soft_wrap=True,
    )


def _parts(text: str | None) -> tuple[bool, ...] | None:
    """Return which parts of a fused layer have factors, of a text such as 101."""
    if text is None:
        return None
    if not set(text) <= {"0", "1"} or "1" not in text:
        raise ConfigError(
            f"--enable-lora is {text!r}, but takes a 1 or a 0 for each part, such as 101."
        )
    return tuple(digit == "1" for digit in text)
