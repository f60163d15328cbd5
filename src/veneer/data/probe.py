"""A little text by which two models are compared: a sample that ships, or a person's own rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from veneer.data.encode import Encoder
from veneer.data.sources import check, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERAL = Path(__file__).parent / "general.txt"
# Some thousand tokens: a mean over them is steady, and a small model reads them in a second.
PROBE_ROWS, PROBE_TOKENS = 16, 256


def probe_rows(
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path | None = None,
    *,
    context: int | None = None,
) -> list[list[int]]:
    """Return the tokens of the first rows of a file, by default of the sample that ships.

    `context`: the most tokens that the model takes. Raises DataError for a file of which nothing
    can be read, or rows that cannot be written with the chat template.
    """
    rows, problems = read_rows(Path(path or GENERAL), limit=PROBE_ROWS)
    encoder = Encoder(tokenizer, max_length=min(PROBE_TOKENS, context or PROBE_TOKENS))
    good = check(rows, problems, skip_bad_rows=False)
    return [tokens for row in good if (tokens := encoder.encode(row).tokens)]
