"""Find the model to plan: whatever `tune` takes, a preset, or a config.json."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from veneer.errors import ModelError, closest
from veneer.models import gguf
from veneer.models.description import describe
from veneer.models.load import config_of, load_config, skeleton_of
from veneer.models.locate import locate
from veneer.plan.presets import PRESETS
from veneer.plan.sizes import Sizes
from veneer.quant.settings import quantization_of

# A name such as qwen3-30b-a3b: what comes before the size, the size, and its unit.
SIZED = re.compile(r"(?P<family>.+?)-?(?P<size>\d+(?:\.\d+)?)(?P<unit>[bm])(?:-.*)?")


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
    if str(name).count("/") == 1 and path.suffix not in (".gguf", ".json"):
        try:
            return load_config(name)
        except ModelError as error:
            hint = f" Presets need no hub; {meant}" if meant else ""
            raise ModelError(f"{error}{hint}") from error
    raise ModelError(
        f"{str(name)!r} is no model here: there is no such directory or file, no such preset, and "
        f"a hub name is owner/model{f'; {meant}' if meant else '.'} Presets are "
        f"{', '.join(PRESETS)}."
    )


def near_presets(name: str) -> list[str]:
    """Return the presets that `name` may mean, most like it first.

    They are of the family that is spelt most like its own: those of its size or, where there is
    none, the two that are nearest to it. A name without a size gives the one spelt most like it.
    """
    name = name.rpartition("/")[2].lower()
    families: dict[str, dict[str, float]] = defaultdict(dict)
    for preset in PRESETS:
        if sized := _family_and_size(preset):
            families[sized[0]][preset] = sized[1]
    asked = _family_and_size(name)
    family = closest(asked[0], families, likeness=0.7) if asked else None
    if asked is None or family is None:
        near = closest(name, PRESETS)
        return [near] if near else []
    distance = {preset: abs(math.log(size / asked[1])) for preset, size in families[family].items()}
    same = [preset for preset, far in distance.items() if far == 0]
    return same or sorted(distance, key=lambda preset: distance[preset])[:2]


def _family_and_size(name: str) -> tuple[str, float] | None:
    """Return ("llama32", 1e9) for llama-3.2-1b, None for a name without a size above 0."""
    match = SIZED.fullmatch(name) if len(name) <= 200 else None
    if match is None or not float(match["size"]):
        return None
    family = re.sub(r"[^a-z0-9]", "", match["family"])
    return family, float(match["size"]) * (1e9 if match["unit"] == "b" else 1e6)


def _read(path: Path) -> dict[str, Any]:
    try:
        json.loads(path.read_text(encoding="utf-8"))  # for a message that says what is wrong
        # transformers' own reader also reads numbers that JSON lacks, such as infinity.
        settings, _ = PretrainedConfig.get_config_dict(str(path))
    except Exception as error:  # damage raises many kinds
        raise ModelError(f"{path} cannot be read as settings of a model: {error}") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path} holds no settings of a model.")
    quantization_of(settings)  # refuses what others than bitsandbytes quantized
    return settings
