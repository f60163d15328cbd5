"""A base, and adapters over it, loaded as their flags say."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import veneer
from veneer.cli.console import quieten_libraries, show_doing, show_notice
from veneer.cli.flags import AdapterFlags, BaseFlags, refuse_preset
from veneer.data.rows import Message
from veneer.errors import Checks, ConfigError, ModelError, VeneerWarning, joined, shortened
from veneer.quant.settings import Bits, quantization_of

if TYPE_CHECKING:
    from veneer.models.load import Base

NAME = "default"  # of the one adapter that acts, where there is one


def load_base(model: str, flags: BaseFlags, adapters: Mapping[str, Path]) -> Base:
    """Return a base, and print what a person should know of it. adapters: those that --bits auto
    follows, by name."""
    refuse_preset(model)
    quieten_libraries()
    bits, pack_head = flags.bits, False
    if bits == "auto":
        bits, pack_head = bits_of(model, adapters)
    base = veneer.load_base(
        model, device=flags.device, dtype=flags.dtype, bits=bits, pack_head=pack_head
    )
    for notice in base.notices:
        show_notice(notice)
    return base


def base_of(model: str | None, adapters: Collection[Path]) -> str:
    """Return the base that a person names, else the one that all adapters name.

    Raises ConfigError where they name none or several, and ModelError where it is not here.
    """
    if model is not None:
        return model
    if not adapters:
        raise ConfigError(
            "MODEL is missing. Only beside an adapter whose files name it may it be left out."
        )
    from veneer.formats.locate import locate
    from veneer.models import locate as models

    bases = {path: locate(path).base for path in adapters}
    name, *others = dict.fromkeys(bases.values())
    if others or not name:
        says = joined(
            f"{path} names {repr(base) if base else 'none'}" for path, base in bases.items()
        )
        raise ConfigError(f"Which base? {says}. Give MODEL.")
    try:
        models.locate(name)
    except ModelError as error:
        where = next(iter(bases))
        raise ModelError(f"{where} names its base, but: {error} Give MODEL.") from error
    show_notice(f"The base is {name}, as the adapter's files say.")
    return name


def load_adapted(
    model: str | None,
    adapters: Mapping[str, Path],
    flags: AdapterFlags,
    *,
    checks: Checks | None = None,
    announce: bool = False,
) -> Base:
    """Return a base with adapters over it by name; the last one acts.

    Where `model` is None, the base is the one that the adapters name. Whether all of them are there
    is added to `checks`, which end before anything is loaded; `announce` prints that it is.
    """
    from veneer.formats.locate import locate
    from veneer.models import locate as models

    checks = checks or Checks("Nothing is loaded")
    for adapter in adapters.values():
        with checks.check(), warnings.catch_warnings(action="ignore", category=VeneerWarning):
            locate(adapter)
    if model is not None:
        with checks.check():
            refuse_preset(model)
            models.locate(model)
    checks.end()
    model = base_of(model, adapters.values())
    if announce:
        show_doing(f"Loading {model} and {joined(map(str, adapters.values()))}")
    base = load_base(model, flags, adapters)
    for name, adapter in adapters.items():
        veneer.load(
            base.model,
            adapter,
            name=name,
            tokenizer=base.tokenizer,
            force=flags.force,
            allow_bin=flags.allow_bin,
        )
    return base


def opening(base: Base, adapter: str, system: str | None) -> list[Message]:
    """Return how conversations with an adapter begin: with the system prompt that is asked for, or
    else the one that the adapter was trained with, of which a notice is printed.

    Raises DataError where the model's chat template has no place for it.
    """
    from veneer.adapter.active import active_adapters_of
    from veneer.data.chat import check_system_prompt
    from veneer.formats.training import system_prompt

    own = system_prompt(active_adapters_of(base.model).notes.get(adapter, {}))
    if system is None and own is not None:
        show_notice(
            f"Using the system prompt that {'the adapter' if adapter == NAME else adapter} was "
            f"trained with: {shortened(own)!r} (--system '' for none)."
        )
        system = own
    if system is None or not system.strip():
        return []
    check_system_prompt(base.tokenizer, system)
    return [Message("system", system)]


def bits_of(model: str, adapters: Mapping[str, Path]) -> tuple[Bits | None, bool]:
    """Return the bits that adapters were trained over, and whether those of the head too.

    Raises ConfigError where that is not one thing, or the base is quantized otherwise already.
    """
    from veneer.formats.locate import locate
    from veneer.formats.training import base_in
    from veneer.models.load import load_config

    if not adapters:
        raise ConfigError("--bits auto follows an adapter, and none is named; give 4, 8 or none.")
    by_name = {name: base_in(locate(path).training) for name, path in adapters.items()}
    bases = {name: base for name, base in by_name.items() if base is not None}
    if not bases:
        show_notice("--bits auto: no adapter says what its base was computed in; nothing is done.")
        return None, False
    if len({base.quantization for base in bases.values()}) > 1:
        each = ", ".join(f"{name} over {base}" for name, base in bases.items())
        raise ConfigError(f"--bits auto cannot follow adapters of different bits ({each}).")
    base = next(iter(bases.values()))
    stored = quantization_of(load_config(model).to_dict())
    if stored is None or stored.is_published:
        return base.bits, base.head
    if stored != base.quantization:
        raise ConfigError(
            f"--bits auto: the adapter was trained over {base}, and {model} is quantized in "
            f"{stored.bits} bits already; name the model that it was made of, or leave --bits."
        )
    return None, False
