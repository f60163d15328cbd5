"""From a file to examples, with every fault of every row in one error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.data.encode import Encoder, Example, encode_rows
from veneer.data.sources import check, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_examples(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    limit: int | None = None,
    skip_bad_rows: bool = False,
) -> tuple[list[Example], int]:
    """Return the rows of a file as examples, and how many bad ones were skipped.

    Rows that cannot be read, written with the chat template, or learnt from (because their answer
    lies beyond `max_length`) are all named in one DataError, unless they are to be skipped.
    """
    rows, problems = read_rows(Path(path), limit=limit)
    examples, unusable = encode_rows(Encoder(tokenizer, max_length=max_length), rows)
    problems = sorted(problems + unusable, key=_place)
    return check(examples, problems, skip_bad_rows=skip_bad_rows), len(problems)


def _place(problem: str) -> tuple[str, int]:
    # The name of the file may itself hold a colon.
    place = re.match(r"(.*?):(?:row )?(\d+): ", problem, re.DOTALL)
    assert place is not None, problem
    return place[1], int(place[2])
