"""Find the model to plan: whatever `tune` takes, a preset, or a config.json."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from veneer.errors import ModelError
from veneer.models import gguf
from veneer.models.description import describe
from veneer.models.load import config_of, load_config, skeleton_of
from veneer.models.locate import locate, nearest_model
from veneer.plan.near_presets import near_presets
from veneer.plan.presets import PRESETS
from veneer.plan.sizes import Sizes
from veneer.quant.settings import quantization_of


def find_sizes(name: str | Path) -> Sizes:
    """Return the sizes of a preset, or of the model at `name`; no weight is read.

    Raises ModelError with what to do.
    """
    return sizes_of(find_config(name))


def sizes_of(config: PretrainedConfig) -> Sizes:
    """Return the sizes of the causal language model that transformers builds from a configuration.

    Raises ModelError if it builds none.
    """
    skeleton: nn.Module = skeleton_of(config)
    # On the meta device, transformers multiplies experts only in 16 bits.
    return Sizes(describe(skeleton.to(torch.bfloat16)))


def find_config(name: str | Path) -> PretrainedConfig:
    """Return the configuration of a preset, or of the model at `name`.

    A file or directory goes before a preset of the same name. Raises ModelError with what to do.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        path /= "config.json"
    if path.is_file() and path.suffix == ".json":
        return config_of(_read(path))
    if path.is_file() and path.suffix != ".gguf":
        raise ModelError(f"{path} is neither a config.json nor a .gguf file.")
    if path.exists():
        with gguf.read_once():
            return load_config(locate(path))  # a .gguf file, perhaps the only one of a directory
    if str(name) in PRESETS:
        return config_of(PRESETS[str(name)])
    near = near_presets(str(name))
    meant = f"did you mean {' or '.join(map(repr, near))}?" if near else ""
    close = f"; {meant}" if meant else nearest_model(path)
    if str(name).count("/") == 1 and path.suffix not in (".gguf", ".json"):
        try:
            return load_config(name)
        except ModelError as error:
            hint = f" Presets need no hub; {meant}" if meant else ""
            raise ModelError(f"{error}{hint}") from error
    raise ModelError(
        f"{str(name)!r} is no model here: there is no such directory or file, no such preset, and "
        f"a hub name is owner/model{close or '.'} Presets are\n{_presets()}."
    )


def _presets() -> str:
    """Return the names of all presets in lines of a terminal's width."""
    return fill(
        ", ".join(PRESETS),
        width=96,
        initial_indent="  ",
        subsequent_indent="  ",
        break_on_hyphens=False,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        json.loads(path.read_text(encoding="utf-8"))  # for a message that says what is wrong
        # transformers' own reader also reads numbers that JSON lacks, such as infinity.
        settings, _ = PretrainedConfig.get_config_dict(str(path))
    except Exception as error:  # damage raises many kinds
        raise ModelError(f"{path} cannot be read as settings of a model: {error}") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path} holds no settings of a model.")
    quantization_of(settings)  # refuses formats that cannot be read
    return settings
