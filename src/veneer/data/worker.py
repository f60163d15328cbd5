"""A process that parses and encodes blocks of rows, which another process sends it.

Between the two go pickled values: they are one program, and nothing from outside is read so. It
ends when its input does, however the other process ended.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.data.blocks import Block
from veneer.data.chunk import About, ChunkWriter
from veneer.data.encode import Encoder, encoded_rows
from veneer.data.problems import Located, Problem
from veneer.data.rows import Conversation, LongRows, Row, parse_row, texts_of
from veneer.data.words import count_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """What becomes of each block: a chunk below `directory`, or without one the count of its words.

    names: of the files, as places have them
    """

    names: list[str]
    tokenizer: PreTrainedTokenizerBase | None = None
    max_length: int = 0
    long_rows: LongRows | None = None
    directory: Path | None = None

    def do(self, block: Block) -> About | Counter[str]:
        """Do it with one block."""
        if self.directory is None:
            rows = _parsed(block, self.names[block.file], block.about)
            return count_words(text for row in rows for text in texts_of(row.value))
        assert self.tokenizer is not None
        return self._chunk(block, self.directory, self.tokenizer)

    def _chunk(self, block: Block, directory: Path, tokenizer: PreTrainedTokenizerBase) -> About:
        about, writer = block.about, ChunkWriter(block.first)
        encoder = Encoder(tokenizer, max_length=self.max_length, long_rows=self.long_rows)
        rows = _noted(_parsed(block, self.names[block.file], about), about)
        for row in encoded_rows(encoder, rows):
            if isinstance(row, Problem):
                about.problems.append((row.place.number, row.what))
            else:
                writer.add(row)
        about.dropped = (len(encoder.dropped), sum(encoder.dropped))
        about.split = encoder.split
        return writer.write(chunk_path(directory, block.number), about)


def chunk_path(directory: Path, number: int) -> Path:
    """Return where a chunk is."""
    return directory / f"chunk-{number:06d}.arrow"


def _parsed(block: Block, name: str, about: About) -> Iterator[Located[Row]]:
    """Yield the rows of a block; count its values and note their problems in `about`."""
    for entry in block.entries(name):
        about.entries += 1
        if isinstance(entry, Problem):
            about.problems.append((entry.place.number, entry.what))
            continue
        try:
            row = parse_row(entry.value)
        except ValueError as error:
            about.problems.append((entry.place.number, str(error)))
        else:
            about.parsed += 1
            yield Located(row, entry.place)


def _noted(rows: Iterable[Located[Row]], about: About) -> Iterator[Located[Row]]:
    """Pass rows on; note keys that nothing reads and what conversations begin with."""
    for row in rows:
        for key in row.value.unused:
            about.unused[key] = about.unused.get(key, 0) + 1
        if isinstance(row.value, Conversation) and len(about.systems) < 2:
            first = row.value.messages[0]
            system = first.content if first.role == "system" else None
            if system not in about.systems:
                about.systems.append(system)
        yield row


def main() -> None:
    """Do the task that comes first with all blocks that follow; answer each."""
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    blocks = sys.stdin.buffer
    task: Task = pickle.load(blocks)  # noqa: S301, from the process that started this one
    # Rows make many short-lived lists and tuples, over which Python would look for cycles again and
    # again: a tenth of the time. It does so between blocks, and passes over what stays.
    gc.freeze()
    gc.disable()
    while True:
        try:
            block = pickle.load(blocks)  # noqa: S301
        except (EOFError, pickle.UnpicklingError):  # the other process has ended, perhaps midway
            return
        try:
            answer: object = task.do(block)
        except Exception as error:
            answer = error
        gc.collect()
        try:
            pickle.dump((block.number, len(block.lines or ()), answer), answers)
            answers.flush()
        except BrokenPipeError:
            os._exit(1)  # without a word, for nobody waits for it


if __name__ == "__main__":
    main()
