"""Headers of safetensors files."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save

from support import mutated_files
from veneer.files import read_tensors

MODULES = ("veneer.files",)
mutate = mutated_files.safetensors


@cache
def seeds() -> list[bytes]:
    numbers = torch.arange(6.0).reshape(2, 3)
    mixed = {"a.lora_A.weight": numbers, "b": numbers.bfloat16(), "c": torch.zeros(0)}
    return [save(mixed, {"format": "pt"}), save({"x": torch.tensor(1)})]


def read(data: bytes, place: Path) -> None:
    file = place / "model.safetensors"
    file.write_bytes(data)
    read_tensors(file, shapes_only=True)
    read_tensors(file)
