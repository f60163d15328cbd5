"""The table of adapter formats: how each is recognised, read and written.

A format is one entry here and one module. Reading returns an AdapterState; writing takes one and
returns notes on what was folded or approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from veneer.checksums import check_sums
from veneer.errors import AdapterError
from veneer.files import read_json
from veneer.formats import checkpoint, loralib, mlx, native
from veneer.formats.base_structure import structure_of
from veneer.formats.fit import fit
from veneer.formats.gguf import adapter as gguf_adapter
from veneer.formats.names import FormatName
from veneer.formats.options import FormatOptions
from veneer.formats.peft import directory as peft
from veneer.formats.state import AdapterState
from veneer.formats.training import BUILT_IN, name_here, read_beside

OURS = {"native", "loralib"}  # whose settings Veneer alone reads
ALWAYS = {"base", "tokenizer", "allow_bin", "shapes_only"}  # allowed with every format


@dataclass(frozen=True)
class Format:
    """One format, with the options beyond ALWAYS that reading and writing take."""

    detects: Callable[[Path], bool]
    read: Callable[[Path, FormatOptions], AdapterState]
    write: Callable[[AdapterState, Path, FormatOptions], list[str]]
    base: Callable[[Path], str]  # the name of the base that its files name, or nothing
    holds: str  # the files that mark it
    training: Callable[[Path], Mapping[str, Any]] = read_beside
    read_options: frozenset[str] = frozenset()
    write_options: frozenset[str] = frozenset()


def _config(options: FormatOptions, name: str) -> Any:
    """Return the configuration of the base: the caller's, else the one that the adapter names."""
    if options.base is None and not name:
        raise AdapterError(
            "What llama.cpp calls a layer depends on the base, and this adapter names none; name "
            "it (--base)."
        )
    return (options.base or structure_of(name)).config


def _read_native(path: Path, options: FormatOptions) -> AdapterState:
    method = native.method_in(path)
    if method is None:
        return checkpoint.read(path, shapes_only=options.shapes_only)
    return native.read(path, method, shapes_only=options.shapes_only)


def native_config(path: Path) -> dict[str, Any]:
    """Return the settings of an adapter in our own format, or of a checkpoint's."""
    return native.config_in(path) or checkpoint.config_in(path)


def _write_native(state: AdapterState, path: Path, options: FormatOptions) -> list[str]:
    native.write(state, path, options.tokenizer)
    if state.base_fingerprint:
        return []
    return ["It does not know its base's fingerprint, so no other base of its shape is refused."]


FORMATS: dict[FormatName, Format] = {
    "native": Format(
        detects=lambda path: native.method_in(path) is not None or checkpoint.detects(path),
        read=_read_native,
        write=_write_native,
        base=lambda path: native.base_in(native_config(path)),
        holds=native.config_name("lora"),
        training=lambda path: native.training_in(native_config(path)),
        write_options=frozenset({"tokenizer"}),
    ),
    "peft": Format(
        detects=peft.detects,
        read=lambda path, options: peft.read(
            path, options.base, allow_bin=options.allow_bin, shapes_only=options.shapes_only
        ),
        write=lambda state, path, options: peft.write(state, path, options.base),
        base=lambda path: str(read_json(path / peft.CONFIG).get("base_model_name_or_path") or ""),
        holds=f"{peft.CONFIG} with {peft.WEIGHTS}",
    ),
    "mlx": Format(
        detects=mlx.detects,
        read=mlx.read,
        write=mlx.write,
        base=lambda path: str(read_json(path / mlx.CONFIG).get("model") or ""),
        holds=f"{mlx.CONFIG} with {mlx.WEIGHTS}",
    ),
    "loralib": Format(
        detects=loralib.detects,
        read=loralib.read,
        write=loralib.write,
        base=loralib.base_of,
        holds=f"{loralib.CONFIG}, or a .pt file of lora_A and lora_B",
        read_options=frozenset({"alpha", "enable_lora"}),
        write_options=frozenset({"enable_lora"}),
    ),
    "gguf": Format(
        detects=gguf_adapter.detects,
        read=lambda path, options: gguf_adapter.read(
            path,
            _config(options, name_here(gguf_adapter.base_of(path), gguf_adapter.training_of(path))),
        ),
        write=lambda state, path, options: gguf_adapter.write(
            state, path, _config(options, state.base_name), approximate=options.approximate
        ),
        base=gguf_adapter.base_of,
        holds="a .gguf file of type adapter",
        training=gguf_adapter.training_of,
        write_options=frozenset({"approximate"}),
    ),
}


def detect(path: Path) -> FormatName | None:
    """Return the format of the adapter at `path`, by content, or None if there is none."""
    return next((name for name, format in FORMATS.items() if format.detects(path)), None)


def read(path: Path, options: FormatOptions) -> AdapterState:
    """Read an adapter of any known format.

    Its layers are those of the base, if that is there. Raises AdapterError if there is no adapter
    at `path`, for options that its format ignores, and for weights that are not as written.
    """
    name = detect(path)
    if name is None:
        raise AdapterError(f"{path} holds no adapter.")
    _refuse_idle(options, name, FORMATS[name].read_options, "reading")
    state = FORMATS[name].read(path, options)
    training = dict(state.training or FORMATS[name].training(path))
    base_name = name_here(state.base_name, training)
    training.pop(BUILT_IN, None)
    state = replace(state, base_name=base_name, training=training)
    state = state if options.base is None else fit(state, options.base)
    if not options.shapes_only:
        # Last, for a fault that has a name says more. Settings are for people to change.
        check_sums(path, only=(".pt", ".safetensors"))
    return state


def write(state: AdapterState, path: Path, to: FormatName, options: FormatOptions) -> list[str]:
    """Write an adapter, all of it at once, and return notes on what was changed for the format.

    Raises AdapterError for what the format has no place for, and for options that it ignores.
    """
    if to not in FORMATS:
        raise AdapterError(f"{to!r} is no format to write; {', '.join(FORMATS)} are.")
    _refuse_idle(options, to, FORMATS[to].write_options, "writing")
    if to in OURS or state.hub_name == state.base_name:
        return FORMATS[to].write(state, path, options)
    own = state.base_name
    state = replace(state, training={**state.training, BUILT_IN: own})
    note = (
        f"The base is named {state.hub_name}, as on the hub. {own} is a copy of it that was "
        "rounded to 4 bits, so answers there may differ a little."
    )
    return [*FORMATS[to].write(state, path, options), note]


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
