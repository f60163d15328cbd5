"""The table of adapter formats: how each is recognised, read and written.

A format is one entry here and one module. Reading returns an AdapterState; writing takes one and
returns notes on what was folded or approximated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from veneer.errors import AdapterError
from veneer.formats import loralib, mlx, native
from veneer.formats.gguf import adapter as gguf_adapter
from veneer.formats.names import FormatName
from veneer.formats.options import FormatOptions
from veneer.formats.peft import directory as peft
from veneer.formats.state import AdapterState

ALWAYS = {"base", "tokenizer", "allow_bin", "shapes_only"}  # allowed with every format


@dataclass(frozen=True)
class Format:
    """One format, with the options beyond ALWAYS that reading and writing take."""

    detects: Callable[[Path], bool]
    read: Callable[[Path, FormatOptions], AdapterState]
    write: Callable[[AdapterState, Path, FormatOptions], list[str]]
    holds: str  # the files that mark it
    read_options: frozenset[str] = frozenset()
    write_options: frozenset[str] = frozenset()


def _config(options: FormatOptions) -> Any:
    if options.base is None:
        raise AdapterError("What llama.cpp calls a layer depends on the base; name it (--base).")
    return options.base.config


def _write_native(state: AdapterState, path: Path, options: FormatOptions) -> list[str]:
    native.write(state, path, options.tokenizer)
    if state.base_fingerprint:
        return []
    return ["It does not know its base's fingerprint, so no other base of its shape is refused."]


FORMATS: dict[FormatName, Format] = {
    "native": Format(
        detects=lambda path: native.method_in(path) is not None,
        read=lambda path, options: native.read(
            path, native.method_in(path) or "lora", shapes_only=options.shapes_only
        ),
        write=_write_native,
        holds=native.config_name("lora"),
        write_options=frozenset({"tokenizer"}),
    ),
    "peft": Format(
        detects=peft.detects,
        read=lambda path, options: peft.read(
            path, allow_bin=options.allow_bin, shapes_only=options.shapes_only
        ),
        write=lambda state, path, options: peft.write(state, path),
        holds=f"{peft.CONFIG} with {peft.WEIGHTS}",
    ),
    "mlx": Format(
        detects=mlx.detects,
        read=mlx.read,
        write=mlx.write,
        holds=f"{mlx.CONFIG} with {mlx.WEIGHTS}",
    ),
    "loralib": Format(
        detects=loralib.detects,
        read=loralib.read,
        write=loralib.write,
        holds=f"{loralib.CONFIG}, or a .pt file of lora_A and lora_B",
        read_options=frozenset({"alpha", "enable_lora"}),
        write_options=frozenset({"enable_lora"}),
    ),
    "gguf": Format(
        detects=gguf_adapter.detects,
        read=lambda path, options: gguf_adapter.read(path, _config(options)),
        write=lambda state, path, options: gguf_adapter.write(
            state, path, _config(options), approximate=options.approximate
        ),
        holds="a .gguf file of type adapter",
        write_options=frozenset({"approximate"}),
    ),
}


def detect(path: Path) -> FormatName | None:
    """Return the format of the adapter at `path`, by content, or None if there is none."""
    return next((name for name, format in FORMATS.items() if format.detects(path)), None)


def read(path: Path, options: FormatOptions) -> AdapterState:
    """Read an adapter of any known format.

    Raises AdapterError if there is none at `path`, and for options that its format ignores.
    """
    name = detect(path)
    if name is None:
        refuse_unknown(path)
    _refuse_idle(options, name, FORMATS[name].read_options, "reading")
    return FORMATS[name].read(path, options)


def write(state: AdapterState, path: Path, to: FormatName, options: FormatOptions) -> list[str]:
    """Write an adapter, all of it at once, and return notes on what was changed for the format.

    Raises AdapterError for what the format has no place for, and for options that it ignores.
    """
    if to not in FORMATS:
        raise AdapterError(f"{to!r} is no format to write; {', '.join(FORMATS)} are.")
    _refuse_idle(options, to, FORMATS[to].write_options, "writing")
    return FORMATS[to].write(state, path, options)


def refuse_unknown(path: Path) -> NoReturn:
    """Raise the AdapterError for a path that holds no adapter."""
    if not path.exists():
        raise AdapterError(f"There is no adapter directory {path}.")
    known = "; ".join(f"{name}: {format.holds}" for name, format in FORMATS.items())
    raise AdapterError(f"{path} holds no adapter (known are {known}).")


def _refuse_idle(
    options: FormatOptions, name: FormatName, useful: frozenset[str], doing: str
) -> None:
    idle = [
        f.name
        for f in fields(options)
        if getattr(options, f.name) and f.name not in {*ALWAYS, *useful}
    ]
    if idle:
        raise AdapterError(f"{' and '.join(idle)} would do nothing on {doing} {name}.")
