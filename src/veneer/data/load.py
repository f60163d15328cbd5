"""From a file to examples, with every problem of every row in one error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.data.encode import Encoder, Example, encode_rows
from veneer.data.problems import Located, Problem
from veneer.data.rows import Row
from veneer.data.sources import check, parse_rows, read_rows
from veneer.errors import DataError, wrong_argument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_examples(
    path: str | Path | Iterable[Mapping[str, object]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    limit: int | None = None,
    skip_bad_rows: bool = False,
) -> tuple[list[Example], int]:
    """Return the rows of a file as examples, and how many bad ones were skipped.

    Instead of a path it takes the rows themselves: a list of mappings, or a `datasets.Dataset`.
    Rows that cannot be read, written with the chat template, or learnt from (because their answer
    lies beyond `max_length`) are all named in one DataError, unless they are to be skipped.
    """
    if isinstance(path, str | Path):
        rows, problems = read_rows(Path(path), limit=limit)
    elif isinstance(path, Mapping) or not isinstance(path, Iterable):
        raise wrong_argument(path, "A path or a list of rows")
    else:
        rows, problems = parse_rows(path, limit=limit)
    encoder = Encoder(tokenizer, max_length=max_length)
    return good_examples(rows, problems, encoder, skip_bad_rows=skip_bad_rows)


def good_examples(
    rows: Sequence[Located[Row]],
    problems: Sequence[Problem],
    encoder: Encoder,
    *,
    skip_bad_rows: bool,
) -> tuple[list[Example], int]:
    """Return what `load_examples` does, from what `read_rows` returned."""
    examples, more = encode_rows(encoder, rows)
    problems = [*problems, *more]
    if encoder.dropped and not examples and not problems:
        raise DataError("all rows are longer than --max-length; raise it, or let --long-rows split")
    return check(examples, problems, skip_bad_rows=skip_bad_rows), len(problems)
