"""The adapter in a checkpoint of a run: which of its tensors are the adapter's, and its settings.

A checkpoint's tensors have the names of a model in training. `description` maps an adapter's own
names to them, so that the adapter is read without that model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.errors import AdapterError, shortened
from veneer.files import read_json, read_tensors
from veneer.formats import native
from veneer.formats.state import AdapterState
from veneer.run_directory import STATE, TENSORS

WEIGHTS, BEST, OTHERS = "weights/", "best/", "adapter/"


def detects(path: Path) -> bool:
    """Return whether a directory is a checkpoint of a run."""
    return (path / STATE).is_file() and (path / TENSORS).is_file()


def description(
    adapter: AdapterState, stored: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a checkpoint says about its adapter, and the tensors that it must hold beside
    those that are `stored` in it. Both share their memory with the model."""
    names = {tensor.data_ptr(): name for name, tensor in stored.items()}
    places: dict[str, dict[str, str]] = {}
    shapes: dict[str, list[int]] = {}
    others: dict[str, Tensor] = {}
    for file, tensors in native.tensors_of(adapter).items():
        places[file] = {}
        for key, tensor in tensors.items():
            name = names.get(tensor.data_ptr())
            if name is None or not _is_view(tensor, stored[name]):
                name = f"{OTHERS}{file}/{key}"
                others[name] = tensor
            elif stored[name].shape != tensor.shape:
                shapes[name] = list(tensor.shape)
            places[file][key] = name
    about = {"config": native.config_of(adapter), "tensors": places, "shapes": shapes}
    return about, others


def _is_view(tensor: Tensor, stored: Tensor) -> bool:
    """Return whether a tensor at the place of a stored one is that one in another shape."""
    if tensor.shape == stored.shape:
        return tensor.stride() == stored.stride()
    contiguous = tensor.is_contiguous() and stored.is_contiguous()
    return contiguous and tensor.numel() == stored.numel()


def config_in(place: Path) -> dict[str, Any]:
    """Return the settings of a checkpoint's adapter, as native files have them."""
    config: dict[str, Any] = _about(read_json(place / STATE), place)["config"]
    return config


def read(place: Path, *, best: bool = False, shapes_only: bool = False) -> AdapterState:
    """Read a checkpoint's adapter, as it was at that step, or as it was best up to there.

    Raises AdapterError for a damaged checkpoint, one that does not say what its adapter is, and one
    without the best weights.
    """
    state = read_json(place / STATE)
    about = _about(state, place)
    stored = read_tensors(place / TENSORS, shapes_only=shapes_only)
    prefix = BEST if best else WEIGHTS
    if best and not any(name.startswith(BEST) for name in stored):
        raise AdapterError(f"{place} has no best weights: up to there, nothing was evaluated.")
    files: dict[str, dict[str, Tensor]] = {}
    try:
        for file, names in about["tensors"].items():
            files[file] = {}
            for key, name in names.items():
                if best and name.startswith(OTHERS):
                    raise AdapterError(f"the best {key} is made at the run's end only")
                tensor = stored[name.replace(WEIGHTS, prefix, 1)]
                shape = about["shapes"].get(name)
                files[file][key] = tensor if shape is None else tensor.reshape(shape)
        adapter = native.state_of_files(about["config"], files)
    except (KeyError, TypeError, AttributeError, RuntimeError, AdapterError) as error:
        why = shortened(str(error), 20_000)
        raise AdapterError(f"The adapter in {place} cannot be used: {why}.") from error
    identity = state.get("identity")
    if isinstance(identity, dict) and "data" in identity:
        # A run knows its tokenizer too, and so tells more bases apart than its model does.
        base = identity.get("base")
        base = base if isinstance(base, dict) else adapter.base_fingerprint
        step, steps = state.get("best_step" if best else "step"), state.get("steps")
        training = {**adapter.training, **about_training(identity, step=step, steps=steps)}
        adapter = replace(adapter, base_fingerprint=base, training=training)
    return adapter


def about_training(
    identity: Mapping[str, Any], *, step: int | None, steps: int | None
) -> dict[str, Any]:
    """Return what an adapter's file says about its training: a hash of the data, the settings but
    for paths on this machine, and after which of the run's steps its weights are.

    steps: of the whole run, None for a checkpoint of an earlier version
    """
    paths = {"data", "eval_data", "base", "model", "from"}
    settings = {name: value for name, value in identity.items() if name not in paths}
    known = {"step": step, "steps": steps}
    reached = {name: count for name, count in known.items() if count is not None}
    return {"data": identity["data"], "recipe": settings, **reached}


def _about(state: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Return what a checkpoint's numbers say about its adapter."""
    about = state.get("adapter")
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
        raise AdapterError(
            f"{place / STATE} does not say what its adapter is: an earlier version of Veneer wrote "
            "it, or its model had no single adapter in use. Go on with its run (veneer tune "
            "--resume), which leaves an adapter at its end."
        )
    return about
