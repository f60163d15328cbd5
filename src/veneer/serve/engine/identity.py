"""What keys and values depend on beside the tokens and the adapter: the base, and how this machine
computes it. Where all of it is the same, blocks of an earlier server are this server's own."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from veneer.checksums import sum_of
from veneer.errors import ModelError
from veneer.formats.training import computed_in
from veneer.generate.runners.runner import Runner
from veneer.kernels.native import library_of
from veneer.models.device import device_name
from veneer.models.fingerprint import base_parameters, fingerprint
from veneer.models.load import Base
from veneer.models.locate import locate
from veneer.models.source import identity_of

COMPUTED_BY = ("veneer", "torch", "transformers")  # whose code gives keys and values


def identity_of_blocks(base: Base, runner: Runner, chunk: int) -> dict[str, str]:
    """Return what tells blocks of `chunk` tokens from those of other bases, programs and machines.

    Rounding differs between kernels, and so between processors and versions.
    """
    device = base.model.device
    library, _ = library_of("decode")
    if device.type == "cpu":
        processor = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    else:
        processor = device_name(device)
    here = computed_in(base.model)
    return {
        "base": base.name,
        "weights": _weights(base),
        "computed in": f"{here.dtype}, {here.bits} bits, {here.kind}, head {here.head}",
        "runner": type(runner).__name__,
        "tokens": str(chunk),
        "device": f"{device.type}, {processor}",
        "kernels": "none" if library is None else sum_of(Path(library._name)),
        "versions": ", ".join(f"{name} {version(name)}" for name in COMPUTED_BY),
    }


def _weights(base: Base) -> str:
    """Return a hash of a base's weights: of its files' sizes and times, or of the copy's version on
    the hub, with samples of what was read from them; of a base that has no files, of all values."""
    marks = fingerprint(base.model)
    place: Path | str = ""
    with suppress(ModelError):
        place = locate(base.name)
    if isinstance(place, Path):
        files = [place] if place.is_file() else [x for x in place.glob("*.*") if x.is_file()]
        marks["files"] = identity_of(files)
    elif commit := getattr(base.model.config, "_commit_hash", None):
        marks["files"] = str(commit)
    else:
        values = hashlib.sha256()
        for name, weight in sorted(base_parameters(base.model).items()):
            values.update(name.encode())
            values.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        marks["values"] = values.hexdigest()
    return hashlib.sha256(repr(sorted(marks.items())).encode()).hexdigest()
