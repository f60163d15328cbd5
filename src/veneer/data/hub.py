"""Data sets by the name that they have on Hugging Face's hub: `hf:NAME` or `hf:NAME:CONFIGURATION`.

NAME may also be a directory that `datasets` can load, or wrote by `save_to_disk`. A split is named
behind an at sign, `hf:NAME@validation`. Nothing of a data set is executed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.data.problems import Located, Place
from veneer.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hf:"
_SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "test": "test"}
_ROWS_AT_ONCE = 1000


def is_hub(path: Path) -> bool:
    """Return whether a path is a name of a data set of the hub."""
    return str(path).startswith(PREFIX)


def has_no_configuration(path: Path) -> bool:
    """Return whether a path is the name of a data set without a configuration."""
    return is_hub(path) and ":" not in str(path).removeprefix(PREFIX)


def splits_of_hub(path: Path) -> dict[str, list[Path]]:
    """Return the splits of a data set, each as a path, by what they are for.

    Raises DataError where there is no such data set.
    """
    name, at, split = str(path).partition("@")
    if at:
        return {"train": [path]}
    splits: dict[str, list[Path]] = {"train": [], "valid": [], "test": [], "others": []}
    for split in _load(name):
        splits[_SPLITS.get(split, "others")].append(Path(f"{name}@{split}"))
    if not splits["train"]:
        splits |= {"train": splits["others"], "others": []}
    return splits


def dataset_of(path: Path) -> Dataset:
    """Return the split of a data set that a path is. Raises DataError where there is none."""
    name, _, split = str(path).partition("@")
    splits = _load(name)
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}, but {', '.join(splits)}")
    return splits[split]


def read_hub(path: Path) -> Iterator[Located[object]]:
    """Yield the rows of a split, each with its number."""
    number = 0
    for batch in dataset_of(path).iter(batch_size=_ROWS_AT_ONCE):
        columns = list(batch)
        for values in zip(*batch.values(), strict=True):
            number += 1
            row = dict(zip(columns, values, strict=True))
            yield Located(row, Place(str(path), number, is_line=False))


@lru_cache(maxsize=8)
def _load(name: str) -> dict[str, Any]:
    """Return the splits of a data set by their names."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name} needs: pip install 'veneer[data]'") from error
    place, _, configuration = name.removeprefix(PREFIX).partition(":")
    directory = Path(place)
    try:
        if (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file():
            loaded = datasets.load_from_disk(place)
        else:
            loaded = datasets.load_dataset(place, configuration or None)
    except Exception as error:  # of many kinds: no such name, configuration, network
        why = " ".join(str(error).split())
        raise DataError(f"{name} cannot be loaded: {why}") from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
