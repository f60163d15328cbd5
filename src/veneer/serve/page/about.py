"""What is known of an adapter: from its own files, and from the run that it came of."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from veneer.errors import AdapterError
from veneer.files import read_json, size_of
from veneer.formats import native
from veneer.formats.peft import directory as peft
from veneer.run_directory import METRICS
from veneer.serve.page.runs import follow_file, settings_of

NAMES = {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets", "use_dora": "dora"}
OURS = ("method", "rank", "alpha", "targets", "layers", "dora", "rslora", "virtual_tokens")


@lru_cache(maxsize=4096)
def about(directory: Path, version: int) -> dict[str, Any]:
    """Return what the page shows of the adapter in `directory`; `version` tells one from the next.

    No tensor is read. An adapter that cannot be read says why, under "error".
    """
    try:
        config, made_for = _config(directory)
    except AdapterError as error:
        return {"error": str(error), "bytes": size_of(directory)}
    told: dict[str, Any] = {name: config[name] for name in OURS if config.get(name)}
    told["bytes"] = size_of(directory)
    told["base"] = made_for
    # `veneer tune` leaves the adapter in a directory of its own beside what it wrote down.
    run = follow_file(directory.parent / METRICS)
    if run.step:
        told["trained"] = settings_of(directory.parent) | {"steps": run.step}
        told["loss"] = run.loss
        told["curve"] = run.losses.shown()
        told["evaluations"] = run.evaluations.shown()
        # The weights that were best are the ones that are kept.
        told["eval_loss"] = min((loss for _, loss in run.evaluations.shown()), default=None)
    return told


def _config(directory: Path) -> tuple[dict[str, Any], str]:
    """Return an adapter's settings under our names, and the base that it was made for."""
    if method := native.found_method(directory):
        config = read_json(directory / native.config_name(method))
        base = config.get("base")
        return config, str(base.get("name", "")) if isinstance(base, dict) else ""
    config = read_json(directory / peft.CONFIG)
    renamed = {ours: config.get(theirs) for theirs, ours in NAMES.items()}
    return renamed, str(config.get("base_model_name_or_path") or "")
