"""Find the presets that a mistyped or unknown name may mean. Imports no torch."""

from __future__ import annotations

import math
import re
from collections import defaultdict

from veneer.errors import closest
from veneer.plan.presets import PRESETS

# A name such as qwen3-30b-a3b: what comes before the size, the size, and its unit.
SIZED = re.compile(r"(?P<family>.+?)-?(?P<size>\d+(?:\.\d+)?)(?P<unit>[bm])(?:-.*)?")


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
