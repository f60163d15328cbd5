"""A base, and adapters over it, loaded as their flags say."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import veneer
from veneer.cli.console import quieten_libraries, show_notice
from veneer.cli.flags import AdapterFlags, BaseFlags, refuse_preset
from veneer.errors import ConfigError, ModelError, joined

if TYPE_CHECKING:
    from veneer.models.load import Base


def load_base(model: str, flags: BaseFlags) -> Base:
    """Return a base, and print what a person should know of it."""
    refuse_preset(model)
    quieten_libraries()
    base = veneer.load_base(model, dtype=flags.dtype, bits=flags.bits)
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
        raise ConfigError("MODEL is missing; only beside an adapter, which names it, may it be.")
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


def load_adapted(model: str | None, adapters: Mapping[str, Path], flags: AdapterFlags) -> Base:
    """Return a base with adapters over it by name; the last one acts.

    Where `model` is None, the base is the one that the adapters name.
    """
    base = load_base(base_of(model, adapters.values()), flags)
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
