"""The process that merges one adapter into the base: a plain model, and its certificate.

    python -m veneer.serve.jobs.merge_worker DIRECTORY SERVER

What it does meanwhile, and how it ended, is in the directory's merge.json. It ends with its server.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from veneer.errors import ModelError, VeneerError
from veneer.files import read_json, size_of, write_json
from veneer.serve.jobs.certificate import certificate_of
from veneer.serve.jobs.merges import STATE, Merge
from veneer.serve.jobs.worker import NICENESS, PR_SET_PDEATHSIG


def merge_in(directory: Path) -> None:
    """Do the merge that a directory asks for, and write down what becomes of it."""
    merge = Merge(**read_json(directory / STATE))
    try:
        certificate = _merge(directory, merge)
        size = size_of(Path(merge.model))
        merge = replace(merge, state="done", doing="", certificate=certificate, bytes=size)
    except Exception as error:
        if not isinstance(error, VeneerError | OSError):
            traceback.print_exception(error)
        merge = replace(merge, state="failed", doing="", why=str(error) or type(error).__name__)
    write_json(directory / STATE, asdict(merge))


def _merge(directory: Path, asked: Merge) -> Mapping[str, Any]:
    """Write the merged model, and return its certificate."""
    # Here, for they import torch.
    from veneer.adapter.certify import certify
    from veneer.adapter.merge import merge, why_not_mergeable
    from veneer.errors import AdapterError
    from veneer.formats.adapters import load
    from veneer.formats.merged import write_model
    from veneer.machine import free_bytes
    from veneer.models.fingerprint import base_parameters, parameter_count
    from veneer.models.load import load_base

    def do(what: str) -> None:
        write_json(directory / STATE, asdict(replace(asked, doing=what)))

    do("loading the base")
    base = load_base(**asked.base)
    load(base.model, asked.adapter, tokenizer=base.tokenizer)
    if why := why_not_mergeable(base.model):
        raise AdapterError(f"This adapter cannot be merged: {why}")
    needed = parameter_count(base.model) * base.model.dtype.itemsize
    free = free_bytes()
    if free is not None and needed > free:
        text = (
            f"Merging needs {needed / 1e9:.2f} GB beside the base, and {free / 1e9:.2f} are free."
        )
        raise ModelError(text)
    do("merging")
    plain = merge(base.model)
    size = sum(weight.nbytes for weight in base_parameters(plain).values())
    if size > asked.most_bytes:
        raise ModelError(
            f"The merged model takes {size / 1e6:,.0f} MB, and {asked.most_bytes / 1e6:,.0f} of "
            "those that files and runs may take are left."
        )
    do("comparing the merged model with the base and its adapter")
    certificate = certificate_of(certify(base.model, plain, base.tokenizer))
    do("writing the merged model")
    write_model(plain, base.tokenizer, Path(asked.model))
    return certificate


def main(directory: str, server: str) -> None:
    """Do the work of a process that merges."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(server):  # it was gone before that
            return
    os.nice(NICENESS)
    merge_in(Path(directory))


if __name__ == "__main__":
    main(*sys.argv[1:])
