"""A base, and adapters over it, loaded as their flags say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import veneer
from veneer.cli.console import quieten_libraries, show_notice
from veneer.cli.flags import AdapterFlags, BaseFlags, refuse_preset

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


def load_adapted(model: str, adapters: Mapping[str, Path], flags: AdapterFlags) -> Base:
    """Return a base with adapters over it by name; the last one acts."""
    base = load_base(model, flags)
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
