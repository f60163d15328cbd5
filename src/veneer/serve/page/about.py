"""What an adapter's own files say about it, and those of the run that trained it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from veneer.errors import AdapterError
from veneer.files import read_json, size_of
from veneer.formats import native
from veneer.formats.peft import directory as peft
from veneer.run_directory import RunDirectory
from veneer.serve.page.runs import follow_file, settings_of

NAMES = {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets", "use_dora": "dora"}
SHOWN = ("method", "rank", "alpha", "targets", "layers", "dora", "rslora", "virtual_tokens")


@lru_cache(maxsize=4096)
def about(directory: Path, version: int) -> dict[str, Any]:
    """Return what the page shows of an adapter; version: changes whenever its name is added again.

    No tensor is read. For an adapter that cannot be read, "error" says why.
    """
    try:
        config, base = _config(directory)
    except AdapterError as error:
        return {"error": str(error), "bytes": size_of(directory)}
    shown: dict[str, Any] = {name: config[name] for name in SHOWN if config.get(name)}
    shown |= {"bytes": size_of(directory), "base": base}
    # `veneer tune` leaves the adapter in its run's directory.
    run = follow_file(RunDirectory(directory.parent).metrics)
    if run.step:
        evaluations = run.evaluations.shown()
        shown |= {
            "trained": settings_of(directory.parent) | {"steps": run.step},
            "loss": run.loss,
            "curve": run.losses.shown(),
            "evaluations": evaluations,
            # The adapter has the weights of the best evaluation, not of the last.
            "eval_loss": min((loss for _, loss in evaluations), default=None),
        }
    return shown


def _config(directory: Path) -> tuple[dict[str, Any], str]:
    """Return an adapter's settings under our names, and the base that it was trained on."""
    if method := native.method_in(directory):
        config = read_json(directory / native.config_name(method))
        base = config.get("base")
        return config, str(base.get("name", "")) if isinstance(base, dict) else ""
    config = read_json(directory / peft.CONFIG)
    renamed = {ours: config.get(theirs) for theirs, ours in NAMES.items()}
    return renamed, str(config.get("base_model_name_or_path") or "")
