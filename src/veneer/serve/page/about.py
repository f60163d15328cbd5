"""What an adapter's own files say about it, and those of the run that trained it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from veneer.errors import AdapterError
from veneer.files import read_json, size_of
from veneer.formats.locate import Located, locate
from veneer.formats.peft import directory as peft
from veneer.formats.table import native_config
from veneer.formats.training import ComputedIn, base_in, other_base, system_prompt
from veneer.run_directory import RunDirectory
from veneer.serve.page.runs import follow_file, settings_of

NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "use_dora": "dora",
    "alora_invocation_tokens": "invocation",
}
SHOWN = (
    *("method", "rank", "alpha", "targets", "layers", "dora", "rslora", "virtual_tokens"),
    "invocation",
)


@lru_cache(maxsize=4096)
def about(directory: Path, version: int, here: ComputedIn) -> dict[str, Any]:
    """Return what the page shows of an adapter; version: changes whenever its name is added again;
    here: what the base that is served is computed in.

    No tensor is read. For an adapter that cannot be read, "error" says why.
    """
    try:
        located = locate(directory)
        config, base, training = _config(located), located.base, located.training
    except AdapterError as error:
        return {"error": str(error), "bytes": size_of(directory)}
    shown: dict[str, Any] = {name: config[name] for name in SHOWN if config.get(name)}
    shown |= {"bytes": size_of(directory), "base": base}
    shown |= {"system": system_prompt(training), "note": other_base("It", training, here)}
    if (over := base_in(training)) is not None:
        shown["over"] = str(over)
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


def with_invocation(shown: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what is shown of an adapter with its invocation as a text in place of token ids, and
    without one that holds anything else."""
    tokens = shown.get("invocation")
    others = {name: value for name, value in shown.items() if name != "invocation"}
    if not isinstance(tokens, list):
        return others
    if not all(isinstance(t, int) and 0 <= t < len(tokenizer) for t in tokens):
        return others
    return others | {"invocation": tokenizer.decode(tokens)}


def _config(adapter: Located) -> dict[str, Any]:
    """Return an adapter's settings under our names, nothing for a format that has others."""
    if adapter.format == "native":
        return native_config(adapter.path)
    if adapter.format == "peft":
        theirs = read_json(adapter.path / peft.CONFIG)
        return {ours: theirs.get(name) for name, ours in NAMES.items()}
    return {}
