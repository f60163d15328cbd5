"""From files to examples, with every problem of every row in one error."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from veneer.data.encode import Encoder, Example, encode_rows
from veneer.data.hub import dataset_of, is_hub
from veneer.data.pairs import PARSERS, Preference, each_of, encode_preferences, rows_in
from veneer.data.problems import Located, Problem, data_error
from veneer.data.readers import COMPRESSED
from veneer.data.rows import Conversation, LongRows, Row, RowShape, parse_row, texts_of, unused_keys
from veneer.data.sources import (
    Data,
    Split,
    check,
    files_of_source,
    parse_values,
    read_rows,
    read_values,
    sources_of,
)
from veneer.data.stream import Progress, count_all_words, encode
from veneer.data.words import count_words
from veneer.errors import DataError, wrong_argument

if TYPE_CHECKING:
    from collections import Counter

    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

# Data of up to this many bytes is encoded here and kept in memory: that takes a few seconds, in
# which processes for it would hardly have begun.
SMALL = 4 * 2**20
SMALL_LIMIT = 20_000  # rows, of which the same is true
_EXPANSION = 4  # of compressed text, about
_BYTES_OF_A_ROW = 256  # of a data set of the hub, about


def load_examples(
    path: str | Path | Iterable[Mapping[str, object]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    shape: RowShape = "answers",
) -> tuple[list[Example], int]:
    """Return the rows of a file as examples, and how many bad ones were skipped.

    shape: what a row is: an answer to learn, a pair of a chosen and a rejected one, or an answer
    that was judged; `Objective.shape` says which of them an objective learns from. Instead of a
    path it takes the rows themselves: a list of mappings, or a `datasets.Dataset`.
    Rows that cannot be read, written with the chat template, or learnt from (because their answer
    lies beyond `max_length`) are all named in one DataError, unless they are to be skipped.
    """

    def read(parse: Callable[[object], T]) -> tuple[list[Located[T]], list[Problem]]:
        if isinstance(path, str | Path):
            return read_values(Path(path), parse, limit=limit)
        if isinstance(path, Mapping) or not isinstance(path, Iterable):
            raise wrong_argument(path, "A path or a list of rows")
        return parse_values(path, parse, limit=limit)

    if shape == "answers":
        rows, problems = read(parse_row)
        encoder = Encoder(tokenizer, max_length=max_length)
        examples, more = encode_rows(encoder, rows)
    else:
        preferences, problems = read(PARSERS[shape])
        encoder = Encoder(tokenizer, max_length=max_length, long_rows="cut")
        examples, more = encode_preferences(encoder, each_of(preferences))
    problems += more
    _refuse_nothing(len(examples), len(problems), bool(encoder.dropped))
    return check(examples, problems, skip_bad_rows=skip_bad_rows), len(problems)


@dataclass
class Loaded:
    """Rows as examples, one source's after another's, and what was met in making them.

    of_sources     how many examples each source has
    sources_read   how many sources were begun before a limit ended the reading
    dropped        the tokens of rows left out as too long: how many rows, and their tokens
    split          rows that became several examples
    unused         keys that nothing reads, each with the number of rows
    systems        what conversations begin with: a system prompt, or None; the first two
    problem_count  all problems; `problems` has those to be shown, `all_problems` yields all
    """

    examples: Sequence[Example] = ()
    of_sources: list[int] = field(default_factory=list)
    sources_read: int = 0
    dropped: tuple[int, int] = (0, 0)
    split: int = 0
    unused: Mapping[str, int] = field(default_factory=dict)
    systems: list[str | None] = field(default_factory=list)
    problem_count: int = 0
    problems: Sequence[Problem] = ()
    all_problems: Callable[[], Iterable[Problem]] = tuple

    def check(self, *, skip_bad_rows: bool, report: Path) -> None:
        """Raise DataError where no row can be used, or where there are problems and they are not to
        be skipped. Where these are more than an error shows, all are written to `report`."""
        rows = len(self.examples)
        _refuse_nothing(rows, self.problem_count, bool(self.dropped[0]))
        total = rows + self.problem_count
        if not self.problem_count or (skip_bad_rows and rows):
            return
        heading = f"none of {total} rows can be used:"
        if rows or not skip_bad_rows:
            heading = (
                f"{self.problem_count} of {total} rows cannot be used; "
                "mend them, or leave them out with --skip-bad-rows:"
            )
        raise data_error(heading, self.problems, self.problem_count, self.all_problems, report)


def _refuse_nothing(examples: int, problems: int, dropped: bool) -> None:
    if dropped and not examples and not problems:
        raise DataError("all rows are longer than --max-length; raise it, or let --long-rows split")


class RowFiles:
    """The files that a person names as data, for one split: read once, in memory where the rows are
    few, and else encoded by other processes into a table on the disk. Preferences are in memory
    always.

    limit: the good rows after which to stop; shape: what a row is.
    """

    def __init__(
        self,
        data: Data,
        split: Split = "train",
        limit: int | None = None,
        *,
        shape: RowShape = "answers",
    ) -> None:
        self.sources, self.split, self.limit = sources_of(data), split, limit
        self.shape: RowShape = shape
        self._files = [files_of_source(source.path, split) for source in self.sources]

    @property
    def files(self) -> list[Path]:
        """Every file, those of a source after those of the one before."""
        return [file for files in self._files for file in files]

    def words(self) -> Generator[Progress, None, Counter[str]]:
        """Return how often each word occurs in the rows."""
        if not is_small(self.files, self.limit):
            return (yield from count_all_words(self.files, limit=self.limit))
        return count_words(
            text for rows, _ in self._read for row in rows for text in texts_of(row.value)
        )

    def load(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        long_rows: LongRows | None = None,
    ) -> Generator[Progress, None, Loaded]:
        """Return the rows as examples.

        Raises DataError where a file cannot be read; problems of rows are in what is returned.
        """
        if self.shape != "answers":
            cut: LongRows = long_rows or "cut"
            return self._preferences(Encoder(tokenizer, max_length=max_length, long_rows=cut))
        if is_small(self.files, self.limit):
            return self._listed(Encoder(tokenizer, max_length=max_length, long_rows=long_rows))
        encoded = yield from encode(
            self.files, tokenizer, max_length=max_length, long_rows=long_rows, limit=self.limit
        )
        counts = iter(encoded.examples_of_files)
        firsts = accumulate((len(files) for files in self._files), initial=0)
        return Loaded(
            encoded.table,
            [sum(next(counts) for _ in files) for files in self._files],
            sum(first < encoded.files_read for first in [*firsts][:-1]),
            encoded.dropped,
            encoded.split,
            encoded.unused,
            encoded.systems,
            encoded.problem_count,
            encoded.problems,
            encoded.all_problems,
        )

    def _listed(self, encoder: Encoder) -> Loaded:
        of_each = [encode_rows(encoder, rows) for rows, _ in self._read]
        of_each += [([], []) for _ in self.sources[len(of_each) :]]
        problems = [problem for _, bad in self._read for problem in bad]
        problems += [problem for _, bad in of_each for problem in bad]
        rows = [row for rows, _ in self._read for row in rows]
        return Loaded(
            [example for examples, _ in of_each for example in examples],
            [len(examples) for examples, _ in of_each],
            len(self._read),
            (len(encoder.dropped), sum(encoder.dropped)),
            encoder.split,
            unused_keys(row.value for row in rows),
            _systems_of(rows),
            len(problems),
            problems,
            lambda: sorted(problems, key=lambda problem: problem.place),
        )

    def _preferences(self, encoder: Encoder) -> Loaded:
        examples: list[Example] = []
        of_sources: list[int] = []
        problems: list[Problem] = []
        rows: list[Located[Preference]] = []
        left, read = self.limit, 0
        for source in self.sources:
            if left != 0:
                parse = PARSERS[self.shape]
                values, bad = read_values(source.path, parse, split=self.split, limit=left)
                left = None if left is None else left - len(values)
                own = each_of(values)
                encoded, more = encode_preferences(encoder, own)
                read, rows = read + 1, rows + own
                problems += bad + more
            else:
                encoded = []
            examples += encoded
            of_sources.append(len(encoded))
        both = [Located(row, each.place) for each in rows for row in rows_in(each.value)]
        return Loaded(
            examples,
            of_sources,
            read,
            (len(encoder.dropped), sum(encoder.dropped)),
            0,
            unused_keys(row.value for row in both),
            _systems_of(both),
            len(problems),
            problems,
            lambda: sorted(problems, key=lambda problem: problem.place),
        )

    @cached_property
    def _read(self) -> list[tuple[list[Located[Row]], list[Problem]]]:
        """The rows of each source and their problems, as far as the limit goes."""
        read: list[tuple[list[Located[Row]], list[Problem]]] = []
        left = self.limit
        for source in self.sources:
            if left == 0:
                break
            rows, problems = read_rows(source.path, split=self.split, limit=left)
            left = None if left is None else left - len(rows)
            read.append((rows, problems))
        return read


def is_small(files: Sequence[Path], limit: int | None = None) -> bool:
    """Return whether rows are so few that they are read here, and stay in memory."""
    if limit is not None and limit <= SMALL_LIMIT:
        return True
    return sum(map(_size, files)) <= SMALL


def _size(file: Path) -> int:
    if is_hub(file):
        return dataset_of(file).num_rows * _BYTES_OF_A_ROW
    packed = file.suffix.lower() in COMPRESSED or file.suffix.lower() == ".parquet"
    return file.stat().st_size * (_EXPANSION if packed else 1)


def _systems_of(rows: Iterable[Located[Row]]) -> list[str | None]:
    """Return what conversations begin with: a system prompt, or None; the first two."""
    systems: dict[str | None, None] = {}
    for row in rows:
        if isinstance(row.value, Conversation) and len(systems) < 2:
            first = row.value.messages[0]
            systems[first.content if first.role == "system" else None] = None
    return list(systems)
