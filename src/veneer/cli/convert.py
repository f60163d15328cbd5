"""`veneer convert`: an adapter in another format, and what was changed for it; a model as GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from veneer.cli.console import OUTPUT, quieten_libraries, refuse_to_replace, show_notice, show_saved
from veneer.cli.flags import AllowBin, Switch
from veneer.errors import ConfigError
from veneer.formats.names import FormatName


def convert(
    adapter: Annotated[
        Path, Parameter(help="Adapter of any format; or, to gguf, the directory of a model.")
    ],
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
        Parameter(
            help="Projections of loralib's fused layers with factors: 101 for first and last."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        Parameter(help="Give every layer this rank, filled up with zeros, and one scaling."),
    ] = None,
    approximate: Annotated[
        Switch, Parameter(help="Write what a format cannot express as near as it can.")
    ] = False,
    force: Annotated[Switch, Parameter(help="Replace the adapter that is in OUT.")] = False,
    allow_bin: AllowBin = False,
    gguf_type: Annotated[
        str | None,
        Parameter(
            help="For a model: store its matrices as f32, f16, bf16, q8_0; else as they are."
        ),
    ] = None,
) -> None:
    """Print a note for each thing that the new format says in another way."""
    if is_model(adapter):
        idle = {"base": base, "alpha": alpha, "enable-lora": enable_lora, "rank": rank}
        idle |= {"approximate": approximate, "allow-bin": allow_bin}
        if flags := [f"--{name}" for name, value in idle.items() if value]:
            raise ConfigError(f"{adapter} is a model, and {', '.join(flags)} for adapters.")
        if to != "gguf":
            raise ConfigError(f"{adapter} is a model, which is converted --to gguf alone.")
        write_gguf(adapter, out, gguf_type, force=force)
        return
    if gguf_type is not None:
        raise ConfigError("--gguf-type is for models; an adapter's file has float32 factors.")
    from veneer.formats.convert import convert as convert_adapter
    from veneer.models.load import load_skeleton

    quieten_libraries()
    done = convert_adapter(
        adapter,
        out,
        to=to,
        base=load_skeleton(base) if base else None,
        base_name=base or "",
        alpha=alpha,
        enable_lora=_enabled(enable_lora),
        rank=rank,
        approximate=approximate,
        force=force,
        allow_bin=allow_bin,
    )
    for note in done.notes:
        show_notice(note, on=OUTPUT)
    layers = f"{done.layers} layer{'' if done.layers == 1 else 's'}"
    show_saved(out, facts=(to, layers), more=f"; from {done.source}")


def is_model(path: Path) -> bool:
    """Return whether a directory holds a model rather than an adapter."""
    from veneer.formats.table import detect

    return (path / "config.json").is_file() and detect(path) is None


def write_gguf(model: Path, out: Path, kind: str | None, *, force: bool = False) -> None:
    """Write a model's directory as a GGUF file, and print what there is to know of it."""
    from veneer.formats.gguf.plain import write_plain

    quieten_libraries()
    if not force or out.is_dir():
        refuse_to_replace(out)
    for note in write_plain(model, out, kind=kind):
        show_notice(note, on=OUTPUT)
    show_saved(out, what="model")


def _enabled(text: str | None) -> tuple[bool, ...] | None:
    """Return which projections of a fused layer have factors, from a text such as 101."""
    if text is None:
        return None
    if not set(text) <= {"0", "1"} or "1" not in text:
        raise ConfigError(
            f"--enable-lora is {text!r}, but takes a 1 or a 0 for each projection, such as 101."
        )
    return tuple(digit == "1" for digit in text)
