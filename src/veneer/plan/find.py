"""A model's shape by the name of a preset, a directory, or its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.errors import ModelError, nearest
from veneer.plan.presets import PRESETS
from veneer.plan.shapes import ModelShape, shape_of


def find_shape(name: str | Path) -> ModelShape:
    """Return the shape of a preset, or of the config.json that `name` is or holds.

    Raises ModelError with what to do.
    """
    return shape_of(find_config(name))


def find_config(name: str | Path) -> Mapping[str, Any]:
    """Return the configuration of a preset, or the config.json that `name` is or holds.

    What stands on the disk goes before a preset of the same name. Raises ModelError with what to
    do.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        path /= "config.json"
    if path.is_file() and path.suffix == ".json":
        return _read(path)
    if str(name) in PRESETS:
        return PRESETS[str(name)]
    if path.suffix == ".gguf":
        raise ModelError(
            f"{path} is a .gguf file, whose shapes cannot be planned; name the config.json of the "
            "model that it was made of, or a preset."
        )
    if path.exists():
        raise ModelError(f"{path} is neither a config.json nor a directory that holds one.")
    raise ModelError(
        f"{str(name)!r} cannot be planned: there is no such directory or config.json, and no such "
        f"preset{nearest(str(name), PRESETS)}. Presets are {', '.join(PRESETS)}."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no settings of a model.")
    return config
