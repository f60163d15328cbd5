"""A file of encoded rows: Arrow's format for files, of which rows are read in place.

Columns: `tokens` (unsigned, 16 bits where they suffice); `learnt`, the borders of the runs of
tokens that are learnt; `number`, the row's line or number in its file, from the chunk's first on;
`piece` of a row that was split, else 0; `truncated` and `unread` as in Example; `digest`, a hash of
tokens and learnt. What was met in making it is in the schema's metadata.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from veneer.data.encode import UNLABELLED, EncodedRow, Example
from veneer.data.problems import Place
from veneer.files import new_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ABOUT = b"veneer"


@dataclass
class About:
    """What was met in making a chunk.

    number, file     which chunk it is, and of which file of the data
    first, is_line   the line or row of the file with which it begins
    next, offset     the line or row, and the byte, of the file with which the next one begins
    entries, parsed  values in that part of the file, and those that were rows
    dropped          rows left out as too long, and their tokens
    split            rows that became several examples
    unused           keys that nothing reads, with the number of rows
    systems          what conversations begin with: a system prompt, or None; two of them at most
    problems         line or row, and what is wrong there
    digest           of the tokens and labels of all rows
    """

    number: int
    file: int
    first: int
    is_line: bool
    next: int = 0
    offset: int = 0
    entries: int = 0
    parsed: int = 0
    examples: int = 0
    dropped: tuple[int, int] = (0, 0)
    split: int = 0
    unused: dict[str, int] = field(default_factory=dict)
    systems: list[str | None] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)
    digest: str = ""


class ChunkWriter:
    """Collects encoded rows, compactly, and writes them as a chunk."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._tokens, self._learnt = array("I"), array("i")
        self._token_ends, self._learnt_ends = array("i", [0]), array("i", [0])
        self._columns = {name: array("I") for name in ("number", "piece", "truncated", "unread")}
        self._digests: list[bytes] = []

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, row: EncodedRow) -> None:
        """Add the examples of a row."""
        for piece, example in enumerate(row.examples, start=1):
            tokens, learnt = array("I", example.tokens), runs_of(example.labels)
            self._tokens += tokens
            self._learnt.frombytes(learnt.tobytes())
            self._token_ends.append(len(self._tokens))
            self._learnt_ends.append(len(self._learnt))
            self._columns["number"].append(row.place.number - self._first)
            self._columns["piece"].append(piece if len(row.examples) > 1 else 0)
            self._columns["truncated"].append(example.truncated)
            self._columns["unread"].append(example.unread)
            self._digests.append(digest_of(tokens, learnt))

    def write(self, path: Path, about: About) -> About:
        """Write the chunk, whole or not at all, and return what is known of it."""
        import pyarrow as pa  # here, because small data goes without

        about.examples = len(self)
        about.digest = hashlib.sha256(b"".join(self._digests)).hexdigest()
        tokens = np.frombuffer(self._tokens, dtype=np.uint32)
        if np.max(tokens, initial=0) < 2**16:
            tokens = tokens.astype(np.uint16)
        ends = [pa.array(np.frombuffer(x, np.int32)) for x in (self._token_ends, self._learnt_ends)]
        columns = {
            "tokens": pa.ListArray.from_arrays(ends[0], pa.array(tokens)),
            "learnt": pa.ListArray.from_arrays(
                ends[1], pa.array(np.frombuffer(self._learnt, np.int32))
            ),
            **{k: pa.array(np.frombuffer(v, np.uint32)) for k, v in self._columns.items()},
            "digest": pa.array(np.frombuffer(b"".join(self._digests), np.uint64)),
        }
        batch = pa.record_batch(columns)
        schema = batch.schema.with_metadata({_ABOUT: json.dumps(asdict(about))})
        with new_file(path) as temporary, pa.ipc.new_file(str(temporary), schema) as writer:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        return about


class Chunk:
    """A chunk in its file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        # Closing it would unmap what the arrays show, which hold it for as long as they live.
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        self.about = About(**json.loads(self._file.schema.metadata[_ABOUT]))
        self._batch = self._file.get_batch(0)
        self._tokens, self._token_ends = _flat(self._batch["tokens"])
        self._learnt, self._learnt_ends = _flat(self._batch["learnt"])

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of numbers: one of the file's, or one of `Column`."""
        if name == "lengths":
            return np.diff(self._token_ends)
        if name == "label_counts":
            ends = np.concatenate([[0], np.cumsum(self._learnt[1::2] - self._learnt[::2])])
            return np.diff(ends[self._learnt_ends // 2])
        return self._batch[name].to_numpy()

    def example(self, row: int, file: str) -> Example:
        """Return a row as an example; `file` is the name of the chunk's file."""
        tokens = self._tokens[self._token_ends[row] : self._token_ends[row + 1]].tolist()
        labels = [UNLABELLED] * len(tokens)
        runs = self._learnt[self._learnt_ends[row] : self._learnt_ends[row + 1]].tolist()
        for start, end in zip(runs[::2], runs[1::2], strict=True):
            labels[start:end] = tokens[start:end]
        return Example(
            tokens,
            labels,
            self.where(row, file),
            self._batch["truncated"][row].as_py(),
            self._batch["unread"][row].as_py(),
        )

    def where(self, row: int, file: str) -> str:
        """Return where a row is from."""
        number = self.about.first + self._batch["number"][row].as_py()
        place = str(Place(file, number, self.about.is_line))
        piece = self._batch["piece"][row].as_py()
        return f"{place}, piece {piece}" if piece else place


def runs_of(labels: list[int]) -> NDArray[np.int32]:
    """Return the first token and the one behind the last of each run that is learnt, all in one."""
    learnt = np.zeros(len(labels) + 2, dtype=np.bool_)
    learnt[1:-1] = np.array(labels) != UNLABELLED
    return np.flatnonzero(learnt[1:] != learnt[:-1]).astype(np.int32)


def digest_of(tokens: Iterable[int], learnt: NDArray[np.int32]) -> bytes:
    """Return eight bytes that tell an example from others by its tokens and which are learnt."""
    tokens = tokens if isinstance(tokens, array) else array("I", tokens)
    return hashlib.blake2b(tokens.tobytes() + b"|" + learnt.tobytes(), digest_size=8).digest()


def _flat(lists: Any) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Return the values of a column of lists, end to end, and where each list begins and ends."""
    return lists.values.to_numpy(), lists.offsets.to_numpy()
