"""Find the adapter that a person means by a path: an adapter of any format, a checkpoint, a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

from veneer.adapter.method import MethodName
from veneer.checksums import problems_of
from veneer.errors import AdapterError, VeneerWarning, closest, listed, nearest
from veneer.files import read_json
from veneer.formats.hub import is_on_hub, pulled
from veneer.formats.names import FormatName
from veneer.formats.table import FORMATS, detect
from veneer.formats.training import name_here
from veneer.models.gguf_header import is_gguf
from veneer.models.source import adapter_file
from veneer.run_directory import STATE, RunDirectory, checkpoint_steps

MOST_LISTED = 10
UNENDED = (None, "interrupted", "failed")  # what a run's progress says before there is a result


@dataclass(frozen=True)
class Located:
    """Where an adapter's own files are, and their format."""

    path: Path
    format: FormatName

    @property
    def base(self) -> str:
        """The name of the base in its files; empty where they name none."""
        return name_here(FORMATS[self.format].base(self.path), self.training)

    @property
    def training(self) -> Mapping[str, Any]:
        """What its files say of its training (training.py), without its tensors."""
        return FORMATS[self.format].training(self.path)


def locate(path: Path) -> Located:
    """Return where the adapter is that `path` means.

    That is an adapter of any format, or a checkpoint; one of the hub (hf:USER/NAME), copied here;
    or a run's directory, which means the run's adapter, and before its end the newest checkpoint;
    or a directory with one adapter in it.
    Warns (VeneerWarning) of what is taken instead of `path` itself, where that is not the run's
    result. Raises AdapterError, which lists what is there, where nothing or more than one fits.
    """
    path = pulled(path) if is_on_hub(path) else path.expanduser()
    if (format := detect(path)) is not None:
        return Located(path, format)
    if not path.is_dir() or (path / "config.json").is_file():
        _refuse(path)
    run = RunDirectory(path)
    results = [place for m in get_args(MethodName) if detect(place := run.adapter(m))]
    checkpoints = checkpoint_steps(run.checkpoints) or checkpoint_steps(path)
    progress = run.read_progress()
    ended = "verdict" in progress or progress.get("ended", "finished") not in UNENDED
    if checkpoints and not (results and ended):
        return _checkpoint(path, checkpoints, progress.get("steps"), results)
    if len(results) == 1:
        return _located(results[0])
    below = results or list(_adapters_below(path, depth=1))
    if len(below) != 1:
        _refuse(path)
    _warn(f"The only adapter in {path} is taken: {below[0]}.")
    return _located(below[0])


def pick(run: Path, *, step: int | None = None) -> Path:
    """Return a run's checkpoint: of a step, or the newest.

    Raises AdapterError, which lists those that are there, where there is none.
    """
    checkpoints = checkpoint_steps(RunDirectory(run).checkpoints) or checkpoint_steps(run)
    if not checkpoints:
        raise AdapterError(f"{run} holds no checkpoints.")
    if step is not None and step not in checkpoints:
        there = listed(map(str, sorted(checkpoints)), most=MOST_LISTED)
        raise AdapterError(f"{run} holds no checkpoint of step {step}, but of {there}.")
    return checkpoints[_newest_whole(checkpoints) if step is None else step]


def _newest_whole(checkpoints: dict[int, Path]) -> int:
    """Return the newest step whose checkpoint is as it was written, the newest where none is: what
    is wrong with it is told when it is read."""
    for step, place in sorted(checkpoints.items(), reverse=True):
        with suppress(AdapterError):
            if (place / STATE).is_file() and not problems_of(place):
                return step
    return max(checkpoints)


def _checkpoint(
    path: Path, checkpoints: dict[int, Path], steps: object, results: list[Path]
) -> Located:
    """Return the newest checkpoint that is whole, and say which it is."""
    newest = _newest_whole(checkpoints)
    place = checkpoints[newest]
    of = f" of {steps:,}" if isinstance(steps, int) else ""
    text = f"The newest checkpoint in {path} is taken, step {newest:,}{of}."
    if newest < max(checkpoints):
        text += f" Step {max(checkpoints):,} is newer, but damaged: veneer verify {path}."
    if results:
        text += f" The run has not ended; to take {results[0].name} there, name it."
    best = read_json(place / STATE).get("best_step")
    if isinstance(best, int) and 0 < best < newest:
        text += f" Step {best:,} was better on the held-out rows: veneer export {path} OUT --best."
    _warn(text)
    return _located(place)


def _located(place: Path) -> Located:
    format = detect(place)
    if format is None:
        raise AdapterError(f"{place} is damaged: it holds no adapter.")
    return Located(place, format)


def _adapters_below(directory: Path, *, depth: int) -> Iterator[Path]:
    """Yield the adapters in a directory: directories and .gguf files, for any .pt file may be one
    of loralib's."""
    for child in sorted(directory.iterdir()):
        if child.name.startswith("."):
            continue  # such as what a killed process has not finished to write
        if (child.is_dir() or child.suffix == ".gguf") and detect(child):
            yield child
        elif child.is_dir() and depth > 1:
            yield from _adapters_below(child, depth=depth - 1)


def _refuse(path: Path) -> NoReturn:
    """Raise the AdapterError for a path that is no adapter, nor the way to one."""
    if not path.exists():
        there = path.parent.iterdir() if path.parent.is_dir() else ()
        names = [child.name for child in there if closest(path.name, [child.name])]
        close = nearest(path.name, [name for name in names if _leads_to_one(path.parent / name)])
        raise AdapterError(f"There is no adapter directory {path}{close}.")
    if file := adapter_file(path):
        raise AdapterError(
            f"{path} is a model with an adapter's tensors in it but without its settings, "
            "as Trainer saves it. Give Trainer callbacks=[veneer.SaveAdapter()], or call "
            "veneer.save(model, DIRECTORY) after training. To save this adapter, veneer.attach the "
            "same LoRA to the base, call model.load_state_dict(safetensors.torch.load_file("
            f"{str(file)!r}), strict=False), and veneer.save."
        )
    if is_gguf(path) or (path / "config.json").is_file():
        raise AdapterError(f"{path} is a model, and an adapter is asked for.")
    below = [str(p) for p in _adapters_below(path, depth=2)] if path.is_dir() else []
    if below:
        named = listed(below, most=MOST_LISTED)
        raise AdapterError(f"{path} is no adapter itself; in it are {named}. Name one of these.")
    known = "; ".join(f"{name}: {format.holds}" for name, format in FORMATS.items())
    raise AdapterError(
        f"{path} holds no adapter (known are {known}), nor is it the directory of a run."
    )


def _leads_to_one(path: Path) -> bool:
    """Return whether `locate` finds an adapter by a path."""
    try:
        with warnings.catch_warnings(action="ignore", category=VeneerWarning):
            return path.exists() and bool(locate(path))
    except (AdapterError, OSError):
        return False


def _warn(text: str) -> None:
    # From one place, so that a text is shown once however often the path is looked up.
    warnings.warn(text, VeneerWarning, stacklevel=2)
