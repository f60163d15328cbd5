"""loralib's state dictionaries in torch's own files, of which only tensors are read; and what
stands beside those that Veneer writes."""

import io
from functools import cache
from pathlib import Path
from random import Random

import torch

from fuzz.target import as_json
from support import mutated_files
from veneer.formats import loralib
from veneer.formats.options import FormatOptions

MODULES = ("veneer.files", "veneer.formats.loralib")
SMALL = {"h.0.q.lora_A": torch.ones(2, 4), "h.0.q.lora_B": torch.zeros(4, 2)}
MERGED = {"h.0.c.lora_A": torch.ones(4, 4), "h.0.c.lora_B": torch.zeros(8, 2)}
LAYERS = {
    "h.0.q": {"layer": "Linear", "r": 2, "lora_alpha": 4},
    "h.0.c": {"layer": "MergedLinear", "r": 2, "lora_alpha": 4, "enable_lora": [True, False, True]},
}
SETTINGS = {"format": 1, "base": "x", "lora_dropout": 0.0, "layers": LAYERS}


def _saved(value: object, *, zip: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zip)
    return file.getvalue()


@cache
def seeds() -> list[bytes]:
    saved = [_saved(SMALL), _saved(MERGED), _saved({"x": 1}), _saved(SMALL, zip=False)]
    return [*saved, as_json(SETTINGS)]


def mutate(data: bytes, random: Random) -> bytes:
    if not data.startswith(b"{"):
        return mutated_files.any_bytes(data or b"x", random)
    settings = {name: dict(layer) for name, layer in LAYERS.items()}
    layer = random.choice(list(settings.values()))
    layer[random.choice(list(layer))] = random.choice(mutated_files.HOSTILE)
    if random.random() < 0.5:
        return as_json(SETTINGS | {"layers": settings})
    return mutated_files.json_text(as_json(SETTINGS), random)


def read(data: bytes, place: Path) -> None:
    if data.startswith(b"{"):
        (place / loralib.WEIGHTS).write_bytes(_saved(SMALL | MERGED))
        (place / loralib.CONFIG).write_bytes(data)
        loralib.read(place, FormatOptions())
    else:
        file = place / "foreign.pt"
        file.write_bytes(data)
        loralib.read(file, FormatOptions(alpha=4.0))
