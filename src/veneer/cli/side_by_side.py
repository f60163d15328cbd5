"""The same question to several adapters, or to one and the base, with what differs marked."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path

from rich.live import Live
from rich.table import Table
from rich.text import Text

import veneer
from veneer.cli.console import OUTPUT, questions
from veneer.cli.flags import AdapterFlags
from veneer.cli.loading import load_adapted, opening
from veneer.data.rows import Message
from veneer.errors import ConfigError
from veneer.generate.sampling import Sampling

BASE = "base"
DIFFERS = "bold yellow underline"


def chat_side_by_side(
    model: str | None,
    compared: Sequence[str],
    system: str | None,
    sampling: Sampling,
    loading: AdapterFlags,
) -> None:
    """Ask until an empty line; each side remembers its own answers. The base has the system prompt
    of the adapter beside it, so that only the adapter makes them differ."""
    directories = named_directories(compared)
    base = load_adapted(model, directories, loading)
    names = [BASE, *directories] if len(directories) == 1 else list(directories)
    openings = {name: opening(base, name, system) for name in directories}
    openings[BASE] = next(iter(openings.values()))
    talks = {name: list(openings[name]) for name in names}
    for question in questions():
        answers = dict.fromkeys(names, "")
        with Live(table(answers), console=OUTPUT, auto_refresh=False) as live:
            for name, talk in talks.items():
                talk.append(Message("user", question))
                veneer.use(base.model, None if name == BASE else name)
                for piece in veneer.stream(base.model, base.tokenizer, talk, sampling=sampling):
                    answers[name] += piece
                    live.update(table(answers), refresh=True)
                talk.append(Message("assistant", answers[name]))


def named_directories(compared: Sequence[str]) -> dict[str, Path]:
    """Return the directories by name. Raises ConfigError, which lists everything that is wrong."""
    directories: dict[str, Path] = {}
    problems = []
    for text in compared:
        name, equals, directory = text.partition("=")
        if not (name and equals and directory):
            problems.append(f"{text!r} must be NAME=DIRECTORY")
        elif name in directories or name == BASE:
            problems.append(f"the name {name!r} is taken")
        directories[name] = Path(directory)
    if problems:
        raise ConfigError(f"--compare cannot be followed: {'; '.join(problems)}.")
    return directories


def table(answers: dict[str, str]) -> Table:
    """Return answers in columns, the words marked that are not in every other answer."""
    columns = Table(show_edge=False, pad_edge=False, expand=True, header_style="bold")
    for name in answers:
        columns.add_column(Text(name), ratio=1, overflow="fold")
    columns.add_row(*marked(list(answers.values())))
    return columns


def marked(texts: Sequence[str]) -> list[Text]:
    """Return the texts with their differing words marked.

    In the first text, those that any other text lacks; in another, those that the first lacks.
    """
    words = [_words(text) for text in texts]
    matches = [
        SequenceMatcher(None, words[0], other, autojunk=False).get_matching_blocks()
        for other in words[1:]
    ]
    common = [set(range(len(words[0]))), *(set[int]() for _ in matches)]
    for number, blocks in enumerate(matches, 1):
        common[0] &= {b.a + i for b in blocks for i in range(b.size)}
        common[number] = {b.b + i for b in blocks for i in range(b.size)}
    return [
        Text("").join(
            Text(word, style="" if i in same or not word.strip() else DIFFERS)
            for i, word in enumerate(text)
        )
        for text, same in zip(words, common, strict=True)
    ]


def _words(text: str) -> list[str]:
    """Return words and the white space between them, which together are the text."""
    edges = [0]
    for i, (a, b) in enumerate(pairwise(text), 1):
        if a.isspace() != b.isspace():
            edges.append(i)
    return [text[a:b] for a, b in pairwise([*edges, len(text)])]
