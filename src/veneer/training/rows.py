"""The data of a run, read and encoded before its base is loaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from veneer.adapter.new_tokens import (
    NO_NEW_TOKENS,
    check_new_tokens,
    extend_tokenizer,
    find_new_tokens,
)
from veneer.adapter.virtual_context import context_left
from veneer.data.encode import Encoder, Example, summarize
from veneer.data.load import good_examples
from veneer.data.packing import split_held_out
from veneer.data.preview import preview
from veneer.data.problems import Located
from veneer.data.rows import Row, common_system_prompt, texts_of, unused_keys
from veneer.data.sources import Splits, read_rows, splits_of
from veneer.training.choose import rows_to_hold_out
from veneer.training.events import DataReady
from veneer.training.recipe import Recipe


@dataclass(frozen=True)
class RunRows:
    """A run's rows as tokens, the tokens to add for them, and notices about them; system: the
    system prompt of all conversations, if they have one and the same."""

    examples: list[Example]
    held_out: list[Example]
    new_tokens: tuple[str, ...]
    notices: list[str]
    ready: DataReady
    system: str | None

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.tokens) for row in (*self.examples, *self.held_out))


def load_rows(
    recipe: Recipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> RunRows:
    """Read the data once, find the tokens to add for it, and encode it with them.

    `tokenizer` stays as it is. Raises DataError for rows that cannot be used, and ConfigError for
    new tokens that cannot be.
    """
    settings = recipe.rows
    rows, problems = read_rows(recipe.data, limit=settings.limit)
    new_tokens = _new_tokens(settings.new_words, rows, tokenizer)
    check_new_tokens(new_tokens, tokenizer)
    if new_tokens:
        tokenizer = copy.deepcopy(tokenizer)
        extend_tokenizer(tokenizer, new_tokens)
    # A model may have no position beyond its context at all.
    context = context_left(config.get_text_config(), recipe.method.virtual_tokens or 0)
    max_length = min(settings.max_length, context or settings.max_length)
    skip_bad_rows = settings.skip_bad_rows
    encoder = Encoder(tokenizer, max_length=max_length, long_rows=settings.long_rows)
    examples, skipped = good_examples(rows, problems, encoder, skip_bad_rows=skip_bad_rows)
    held_out: list[Example] = []
    splits = splits_of(recipe.data)
    uses_valid = bool(splits.valid) and settings.eval_data is None and not settings.eval_rows
    if eval_data := recipe.data if uses_valid else settings.eval_data:
        valid_rows, problems = read_rows(eval_data, split="valid")
        evaluated = Encoder(tokenizer, max_length=max_length, long_rows=settings.long_rows)
        held_out, more = good_examples(valid_rows, problems, evaluated, skip_bad_rows=skip_bad_rows)
        rows = [*rows, *valid_rows]
        skipped += more
    elif eval_rows := (
        rows_to_hold_out(len(examples)) if settings.eval_rows is None else settings.eval_rows
    ):
        training, evaluation = split_held_out(
            len(examples), eval_rows=eval_rows, seed=recipe.training.seed
        )
        held_out = [examples[i] for i in evaluation]
        examples = [examples[i] for i in training]
    ready = DataReady(
        summarize(examples, encoder.dropped),
        summarize(held_out) if held_out else None,
        skipped,
        preview(examples[0], tokenizer),
        eval_data,
    )
    notices = []
    if splits.valid or splits.test or splits.others:
        notices.append(_about_splits(splits, uses_valid=uses_valid))
    if any(file.suffix.lower() in (".txt", ".md") for file in splits.train):
        notices.append("In .txt and .md files each paragraph, up to a blank line, is a row.")
    if encoder.split:
        notices.append(
            f"{_rows(encoder.split)} longer than {max_length:,} tokens split at the ends of "
            "paragraphs or sentences; nothing is lost by that."
        )
    if encoder.uses_plain_template:
        notices.append("The tokenizer has no chat template; turns are written as plain lines.")
    if unused := unused_keys(row.value for row in rows):
        counts = ", ".join(f"{key!r} ({_rows(count)})" for key, count in unused.items())
        notices.append(f"Keys that nothing reads: {counts}.")
    if settings.new_words == "auto" and not new_tokens:
        notices.append(f"--new-words auto adds no token: {NO_NEW_TOKENS}.")
    system = common_system_prompt(row.value for row in rows)
    return RunRows(examples, held_out, new_tokens, notices, ready, system)


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
    new_words: str | None, rows: list[Located[Row]], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, ...]:
    """Return the tokens to add: those that are named, or those that `auto` finds in the rows."""
    if not new_words:
        return ()
    if new_words != "auto":
        return tuple(word.strip() for word in new_words.split(",") if word.strip())
    texts = (text for row in rows for text in texts_of(row.value))
    return tuple(find_new_tokens(texts, tokenizer))
