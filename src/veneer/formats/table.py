"""The table of adapter formats: how each is recognised, read and written.

A format is one entry here and one module. Reading gives an AdapterState, in which all formats meet;
writing takes one and returns notes: what was folded or approximated, in sentences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from veneer.errors import AdapterError
from veneer.formats import loralib, mlx, native
from veneer.formats.fold import start_notes
from veneer.formats.gguf import adapter as gguf_adapter
from veneer.formats.given import Given
from veneer.formats.names import FormatName
from veneer.formats.peft import directory as peft
from veneer.formats.state import AdapterState

ALWAYS = {"base", "tokenizer", "allow_bin"}  # may be given whatever the format


@dataclass(frozen=True)
class Format:
    """One format, with the parts of Given beyond the base that it heeds."""

    found: Callable[[Path], bool]
    read: Callable[[Path, Given], AdapterState]
    write: Callable[[AdapterState, Path, Given], list[str]]
    holds: str  # by which files it is known
    on_reading: frozenset[str] = frozenset()
    on_writing: frozenset[str] = frozenset()


def _config(given: Given) -> Any:
    if given.base is None:
        raise AdapterError("What llama.cpp calls a layer depends on the base; name it (--base).")
    return given.base.config


def _write_native(state: AdapterState, path: Path, given: Given) -> list[str]:
    native.write(state, path, given.tokenizer)
    if state.base_fingerprint:
        return []
    return ["It does not know its base's fingerprint, so no other base of its shape is refused."]


def _write_peft(state: AdapterState, path: Path, given: Given) -> list[str]:
    peft.write(state, path)
    return start_notes(state)


FORMATS: dict[FormatName, Format] = {
    "native": Format(
        found=lambda path: native.found_method(path) is not None,
        read=lambda path, given: native.read(path, native.found_method(path) or "lora"),
        write=_write_native,
        holds=native.config_name("lora"),
        on_writing=frozenset({"tokenizer"}),
    ),
    "peft": Format(
        found=peft.is_here,
        read=lambda path, given: peft.read(path, allow_bin=given.allow_bin),
        write=_write_peft,
        holds=f"{peft.CONFIG} with {peft.WEIGHTS}",
    ),
    "mlx": Format(
        found=mlx.found,
        read=mlx.read,
        write=mlx.write,
        holds=f"{mlx.CONFIG} with {mlx.WEIGHTS}",
    ),
    "loralib": Format(
        found=loralib.found,
        read=loralib.read,
        write=loralib.write,
        holds=f"{loralib.CONFIG}, or a .pt file of lora_A and lora_B",
        on_reading=frozenset({"alpha", "enable_lora"}),
        on_writing=frozenset({"enable_lora"}),
    ),
    "gguf": Format(
        found=gguf_adapter.found,
        read=lambda path, given: gguf_adapter.read(path, _config(given)),
        write=lambda state, path, given: gguf_adapter.write(
            state, path, _config(given), approximate=given.approximate
        ),
        holds="a .gguf file of type adapter",
        on_writing=frozenset({"approximate"}),
    ),
}


def found(path: Path) -> FormatName | None:
    """Return the format of the adapter at `path`, by content, or None if there is none."""
    return next((name for name, format in FORMATS.items() if format.found(path)), None)


def read(path: Path, given: Given) -> AdapterState:
    """Read an adapter of any known format.

    Raises AdapterError if there is none at `path`, and for what is given though it says it itself.
    """
    name = found(path)
    if name is None:
        refuse_unknown(path)
    _refuse_idle(given, name, FORMATS[name].on_reading, "reading")
    return FORMATS[name].read(path, given)


def write(state: AdapterState, path: Path, to: FormatName, given: Given) -> list[str]:
    """Write an adapter, all of it at once, and return notes on what was changed for the format.

    Raises AdapterError for what the format has no place for, and for what is given in vain.
    """
    if to not in FORMATS:
        raise AdapterError(f"{to!r} is no format to write; {', '.join(FORMATS)} are.")
    _refuse_idle(given, to, FORMATS[to].on_writing, "writing")
    return FORMATS[to].write(state, path, given)


def refuse_unknown(path: Path) -> NoReturn:
    """Raise the AdapterError for a path that holds no adapter."""
    if not path.exists():
        raise AdapterError(f"There is no adapter directory {path}.")
    known = "; ".join(f"{name}: {format.holds}" for name, format in FORMATS.items())
    raise AdapterError(f"{path} holds no adapter (known are {known}).")


def _refuse_idle(given: Given, name: FormatName, heeded: frozenset[str], doing: str) -> None:
    idle = [
        f.name for f in fields(given) if getattr(given, f.name) and f.name not in {*ALWAYS, *heeded}
    ]
    if idle:
        raise AdapterError(f"{' and '.join(idle)} would do nothing on {doing} {name}.")
