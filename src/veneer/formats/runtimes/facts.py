"""The settings, names and shapes in an adapter's files, read without interpreting them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from safetensors import SafetensorError, safe_open

from veneer.errors import AdapterError, joined
from veneer.files import read_json
from veneer.formats import mlx
from veneer.formats.names import FormatName
from veneer.formats.peft import directory as peft
from veneer.formats.peft.rules import BELOW

Shapes = dict[str, tuple[int, ...]]
KEYS = ("general.", "adapter.")  # how keys of GGUF's metadata begin that are about adapters
# Types that the rules rely on.
SETTING_TYPES = {
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "lora_parameters": dict,
    "modules_to_save": list,
}


@dataclass(frozen=True)
class Facts:
    """Settings by name, shapes by tensor, and the names of the files beside them."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    files: frozenset[str] = frozenset()

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer, by path: the rows of PEFT's lora_A or lora_embedding_A."""
        return {path: rows for path, rows in self._rows.items() if not _of_experts(path)}

    @property
    def names(self) -> set[str]:
        """The last names of the layers, such as q_proj, and of modules with stacks of experts."""
        return {path.replace(BELOW, "").rpartition(".")[2] for path in self._rows}

    @property
    def stacks(self) -> list[str]:
        """The places of stacks of experts in PEFT's file: `experts`, `experts.base_layer`."""
        return [path for path in self._rows if _of_experts(path)]

    @property
    def _rows(self) -> dict[str, int]:
        rows = {}
        for key, shape in self.shapes.items():
            match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(embedding_A|A\.weight)", key)
            if match and shape:
                rows[match[1]] = shape[0]
        return rows

    @property
    def embeddings(self) -> set[str]:
        """The last names of the layers that have factors of embeddings."""
        ends = (".lora_embedding_A", ".lora_embedding_B")
        return {key.split(".")[-2] for key in self.shapes if key.endswith(ends)}

    @property
    def highest(self) -> int:
        """The highest rank in the settings or the tensors."""
        settings = [self.config.get("r"), *(self.config.get("rank_pattern") or {}).values()]
        whole = [rank for rank in settings if isinstance(rank, int)]
        return max([*whole, *self.ranks.values()], default=0)


def _of_experts(path: str) -> bool:
    """Return whether a module in PEFT's file holds stacks of experts, and is no layer."""
    return "expert" in path.replace(BELOW, "").rpartition(".")[2] and "gate" not in path


def facts_of(path: Path, format: FormatName) -> Facts:
    """Read the files of a PEFT, MLX or GGUF adapter. Raises AdapterError for damaged ones."""
    if format == "gguf":
        return _gguf(path)
    config, weights = (mlx.CONFIG, mlx.WEIGHTS) if format == "mlx" else (peft.CONFIG, peft.WEIGHTS)
    settings = read_json(path / config)
    problems = [
        f"{name} is {settings[name]!r}, but must be a {kind.__name__}"
        for name, kind in SETTING_TYPES.items()
        if settings.get(name) is not None and not isinstance(settings[name], kind)
    ]
    if problems:
        raise AdapterError(f"{path / config} cannot be used: {joined(problems)}.")
    files = frozenset(file.name for file in path.iterdir())
    return Facts(settings, _shapes(path / weights), files)


def _shapes(path: Path) -> Shapes:
    try:
        with safe_open(path, framework="numpy") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read as tensors ({error}).") from error


def _gguf(path: Path) -> Facts:
    try:
        reader = GGUFReader(path)
        config = {
            key: field.contents() for key, field in reader.fields.items() if key.startswith(KEYS)
        }
        shapes = {t.name: tuple(int(n) for n in t.shape) for t in reader.tensors}
    except Exception as error:  # the reader has no errors of its own
        raise AdapterError(f"{path} cannot be read as GGUF ({error}).") from error
    return Facts(config, shapes)
