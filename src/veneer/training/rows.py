"""The data of a run, read and encoded before its base is loaded."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from veneer.adapter.config import LoRA
from veneer.adapter.invocation import invocation_start
from veneer.adapter.new_tokens import (
    NO_NEW_TOKENS,
    check_new_tokens,
    extend_tokenizer,
    tokens_for,
)
from veneer.adapter.virtual_context import context_left
from veneer.data.columns import lengths_of, select, summarize
from veneer.data.encode import UNLABELLED, Example
from veneer.data.load import Loaded, RowFiles
from veneer.data.mixture import duplicates, weighted_rows
from veneer.data.packing import held_out_rows
from veneer.data.preview import preview
from veneer.data.readers import kind_of
from veneer.data.rows import LongRows
from veneer.data.sources import Source, Splits, splits_of
from veneer.data.stream import Progress
from veneer.data.table import ExampleTable, all_but
from veneer.errors import DataError, listed
from veneer.files import new_file
from veneer.processes.world import World
from veneer.run_directory import RunDirectory
from veneer.training.choose import rows_to_hold_out
from veneer.training.events import DataReady, Encoding, Event
from veneer.training.recipe import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")
# Rows of which a run of an earlier version may have had the hash.
MOST_HASHED = 2**20
MOST_LOOKED_THROUGH = 1000  # rows, to say where an invocation is


@dataclass(frozen=True)
class RunRows:
    """A run's rows as tokens, the tokens to add for them, and notices about them; system: the
    system prompt of all conversations, if they have one and the same."""

    examples: Sequence[Example]
    held_out: Sequence[Example]
    new_tokens: tuple[str, ...]
    notices: list[str]
    ready: DataReady
    system: str | None

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(
            int(np.max(lengths_of(rows), initial=0)) for rows in (self.examples, self.held_out)
        )

    def identity(self, before: str | None = None) -> str:
        """Return a hash of all tokens and labels.

        before: the hash of the run that is to go on, which is returned where these rows have it: of
        a table, earlier versions had another one.
        """
        both = (self.examples, self.held_out)
        if not any(isinstance(rows, ExampleTable) for rows in both):
            return _hash_of(*both)
        digests = [
            rows.digest if isinstance(rows, ExampleTable) else _hash_of(rows, []) for rows in both
        ]
        now = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        if before not in (None, now) and len(self.examples) <= MOST_HASHED:
            earlier = _hash_of(*both)
            return earlier if earlier == before else now
        return now


def _hash_of(examples: Sequence[Example], held_out: Sequence[Example]) -> str:
    """Return the hash of the JSON text [[tokens, labels], ...]."""
    text = hashlib.sha256(b"[")
    for number, row in enumerate(chain(examples, held_out)):
        content: list[object] = [row.tokens, row.labels]
        if row.second:
            content += [row.second, row.desirable]
        text.update((", " * (number > 0) + json.dumps(content)).encode())
    text.update(b"]")
    return text.hexdigest()[:16]


def load_rows(
    recipe: Recipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Generator[Event, None, RunRows]:
    """Read the data once, find the tokens to add for it, and encode it with them.

    `tokenizer` stays as it is. Raises DataError for rows that cannot be used, and ConfigError for
    new tokens that cannot be.
    """
    settings, report = recipe.rows, RunDirectory(recipe.out).faults
    shape = recipe.objective.shape
    rows = RowFiles(recipe.data, limit=settings.limit, shape=shape)
    new_tokens = yield from _new_tokens(settings.new_words, rows, tokenizer)
    check_new_tokens(new_tokens, tokenizer)
    if new_tokens:
        tokenizer = copy.deepcopy(tokenizer)
        extend_tokenizer(tokenizer, new_tokens)
    # A model may have no position beyond its context at all.
    beside = (recipe.method.virtual_tokens or 0) + recipe.objective.is_ranking
    context = context_left(config.get_text_config(), beside)
    max_length = min(settings.max_length, context or settings.max_length)
    loaded = yield from _loaded(rows, tokenizer, max_length, settings.long_rows)
    loaded.check(skip_bad_rows=settings.skip_bad_rows, report=report)
    examples, of_sources = loaded.examples, loaded.of_sources
    skipped, unused, systems = loaded.problem_count, Counter(loaded.unused), loaded.systems
    notices = []
    if unread := [str(source.path) for source in rows.sources[loaded.sources_read :]]:
        ends = f"--limit {settings.limit} ends before {', '.join(unread)}"
        if rows.sources[0].weight is not None:
            raise DataError(f"{ends}, so that no row of it can be drawn; raise it or leave it out.")
        notices.append(f"{ends}, of which no row is read.")
    if settings.deduplicate:
        examples, of_sources, notice = _without_duplicates(examples, of_sources, recipe)
        notices.append(notice)
    held_out: Sequence[Example] = []
    splits = splits_of(recipe.data)
    uses_valid = bool(splits.valid) and settings.eval_data is None and not settings.eval_rows
    if eval_data := recipe.data if uses_valid else settings.eval_data:
        files = RowFiles(splits.valid if uses_valid else eval_data, "valid", shape=shape)
        evaluated = yield from _loaded(files, tokenizer, max_length, settings.long_rows)
        evaluated.check(skip_bad_rows=settings.skip_bad_rows, report=report)
        held_out = evaluated.examples
        unused.update(evaluated.unused)
        systems = [*systems, *(s for s in evaluated.systems if s not in systems)]
        skipped += evaluated.problem_count
    elif eval_rows := (
        rows_to_hold_out(len(examples)) if settings.eval_rows is None else settings.eval_rows
    ):
        seed = recipe.training.seed
        evaluation = held_out_rows(len(examples), eval_rows=eval_rows, seed=seed)
        held_out = select(examples, evaluation)
        of_sources = _counts_without(of_sources, evaluation)
        examples = select(examples, all_but(len(examples), evaluation))
    weights = [source.weight for source in rows.sources]
    if len(weights) > 1 and None not in weights:
        examples, notice = _weighted(examples, of_sources, rows.sources, recipe.training.seed)
        notices.append(notice)
    summary = summarize(examples)
    count, tokens = loaded.dropped
    ready = DataReady(
        replace(summary, dropped=count, lost=summary.lost + tokens),
        summarize(held_out) if held_out else None,
        skipped,
        preview(examples[0], tokenizer),
        eval_data,
    )
    if splits.valid or splits.test or splits.others:
        notices.append(_about_splits(splits, uses_valid=uses_valid))
    if any(kind_of(file) in (".txt", ".md") for file in splits.train):
        notices.append("In .txt and .md files each paragraph, up to a blank line, is a row.")
    if loaded.split:
        notices.append(
            f"{_rows(loaded.split)} longer than {max_length:,} tokens split at the ends of "
            "paragraphs or sentences; nothing is lost by that."
        )
    if tokenizer.chat_template is None:
        notices.append("The tokenizer has no chat template; turns are written as plain lines.")
    if unused:
        counts = ", ".join(f"{key!r} ({_rows(n)})" for key, n in unused.most_common())
        notices.append(f"Keys that nothing reads: {counts}.")
    if settings.new_words == "auto" and not new_tokens:
        notices.append(f"--new-words auto adds no token: {NO_NEW_TOKENS}.")
    notices += _about_invocation(recipe.lora, examples, tokenizer)
    system = systems[0] if len(systems) == 1 else None
    return RunRows(examples, held_out, new_tokens, notices, ready, system)


def _about_invocation(
    lora: LoRA, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Say from where on an adapter with an invocation acts, and what it learns nothing from.

    Raises DataError where no row has the invocation.
    """
    if not (invocation := lora.invocation_tokens):
        return []
    first = min(len(examples), MOST_LOOKED_THROUGH)
    rows = [examples[i] for i in range(first)]
    starts = [invocation_start(row.tokens, invocation) for row in rows]
    text, ids = tokenizer.decode([*invocation]), ", ".join(map(str, invocation))
    without = [row.where for row, start in zip(rows, starts, strict=True) if start is None]
    of_all = f"of {_rows(first)}" if first == len(examples) else f"of the first {_rows(first)}"
    behind = (examples[i].tokens for i in range(first, len(examples)))
    if len(without) == first and all(invocation_start(row, invocation) is None for row in behind):
        raise DataError(
            f"None of {_rows(len(examples))} has the invocation {text!r} (tokens {ids}), from "
            "which on alone the adapter acts, so it would learn nothing. Name one that the chat "
            "template writes into each row, or write it into the rows."
        )
    notices = [f"The adapter acts from {text!r} (tokens {ids}) on, where a row has it last."]
    if without:
        notices.append(
            f"{len(without):,} {of_all} have no invocation, and the adapter learns nothing "
            f"from them: {listed(without)}."
        )
    # The output of each token is the next one, so that of the first is the first to change.
    early = sum(
        label != UNLABELLED
        for row, start in zip(rows, starts, strict=True)
        if start is not None
        for label in row.labels[: start + 1]
    )
    if early:
        learnt = sum(row.label_tokens for row in rows)
        notices.append(
            f"{early:,} of {learnt:,} tokens that are learnt come before the invocation, and the "
            "adapter learns nothing from them."
        )
    return notices


def in_every_process(world: World, work: Generator[Event, None, T]) -> Generator[Event, None, T]:
    """Return the result of the work, which every process does, and yield its events.

    Raises in every process what the work raised in any.
    """
    failure: Exception | None = None
    try:
        result = yield from work
    except Exception as error:
        failure = error

    def outcome() -> T:
        if failure is not None:
            raise failure
        return result

    return world.together(outcome)


def _loaded(
    rows: RowFiles,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    long_rows: LongRows | None,
) -> Generator[Event, None, Loaded]:
    work = rows.load(tokenizer, max_length=max_length, long_rows=long_rows)
    return (yield from _shown("encoding", work))


def _shown(what: str, work: Generator[Progress, None, T]) -> Generator[Event, None, T]:
    """Return the result of the work, and yield how far it is."""
    while True:
        try:
            at = next(work)
        except StopIteration as done:
            return done.value
        yield Encoding(what, at.rows, at.bytes, at.total, at.waiting)


def _without_duplicates(
    examples: Sequence[Example], of_sources: list[int], recipe: Recipe
) -> tuple[Sequence[Example], list[int], str]:
    """Return the examples without those that an earlier one equals, and what was removed."""
    removed, originals = duplicates(examples)
    if not len(removed):
        return examples, of_sources, "--deduplicate left out nothing: all rows differ."
    report = RunDirectory(recipe.out).duplicates
    with new_file(report) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row, original in zip(removed.tolist(), originals.tolist(), strict=True):
            file.write(f"{examples[row].where} is {examples[original].where}\n")
    first = f"{examples[int(removed[0])].where} is {examples[int(originals[0])].where}"
    notice = (
        f"--deduplicate left out {len(removed):,} of {_rows(len(examples))} whose tokens and "
        f"labels an earlier one has ({first}); all of them are in {report}."
    )
    kept = select(examples, all_but(len(examples), removed))
    return kept, _counts_without(of_sources, removed), notice


def _counts_without(of_sources: Sequence[int], removed: NDArray[np.integer]) -> list[int]:
    """Return how many rows each source has without those removed, which ascend."""
    ends = np.cumsum(of_sources)
    return np.diff(ends - np.searchsorted(removed, ends), prepend=0).tolist()


def _weighted(
    examples: Sequence[Example], of_sources: list[int], sources: Sequence[Source], seed: int
) -> tuple[Sequence[Example], str]:
    """Return as many rows of each source as its weight says, and that in words."""
    if empty := [str(s.path) for s, n in zip(sources, of_sources, strict=True) if not n]:
        raise DataError(f"No row of {', '.join(empty)} is left to train on; leave it out.")
    weights = [source.weight or 0.0 for source in sources]
    rows = weighted_rows(of_sources, weights, seed=seed)
    counts = np.diff(np.searchsorted(rows, np.cumsum(of_sources)), prepend=0).tolist()
    of_each = "; ".join(
        f"{source.path}: {_rows(now)} of {before:,}"
        for source, now, before in zip(sources, counts, of_sources, strict=True)
    )
    return select(examples, rows), f"An epoch by the weights: {of_each}."


def _about_splits(splits: Splits, *, uses_valid: bool) -> str:
    """Say which files of a directory are read, and what for."""
    unread = [*([] if uses_valid else splits.valid), *splits.test, *splits.others]
    return "; ".join(
        f"{what}: {', '.join(file.name for file in files)}"
        for what, files in (
            ("Trained on", splits.train),
            ("evaluated on", splits.valid if uses_valid else []),
            ("not read", unread),
        )
        if files
    )


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _new_tokens(
    new_words: str | None, rows: RowFiles, tokenizer: PreTrainedTokenizerBase
) -> Generator[Event, None, tuple[str, ...]]:
    """Return the tokens to add: those that are named, or those that `auto` finds in the rows."""
    if not new_words:
        return ()
    if new_words != "auto":
        return tuple(word.strip() for word in new_words.split(",") if word.strip())
    counts = yield from _shown("counting words", rows.words())
    return tuple(tokens_for(counts, tokenizer))
