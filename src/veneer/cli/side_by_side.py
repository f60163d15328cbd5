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
from veneer.cli.commands import load_named
from veneer.cli.console import OUTPUT
from veneer.data.rows import Message
from veneer.errors import ConfigError
from veneer.generate.sampling import Sampling
from veneer.quant.settings import Bits

BASE = "base"
DIFFERS = "bold yellow underline"


def run_compared_chat(
    model: str,
    compared: Sequence[str],
    sampling: Sampling,
    *,
    dtype: str,
    bits: Bits | None,
    force: bool,
    allow_bin: bool,
) -> None:
    """Ask on until an empty line; each side remembers what it said itself."""
    places = named_places(compared)
    base = load_named(model, places, dtype=dtype, bits=bits, force=force, allow_bin=allow_bin)
    names = [BASE, *places] if len(places) == 1 else list(places)
    talks: dict[str, list[Message]] = {name: [] for name in names}
    while True:
        try:
            question = OUTPUT.input("[bold]You:[/] ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        said = dict.fromkeys(names, "")
        with Live(table(said), console=OUTPUT, auto_refresh=False) as live:
            for name, talk in talks.items():
                talk.append(Message("user", question))
                veneer.use(base.model, None if name == BASE else name)
                for piece in veneer.stream(base.model, base.tokenizer, talk, sampling=sampling):
                    said[name] += piece
                    live.update(table(said), refresh=True)
                talk.append(Message("assistant", said[name]))


def named_places(compared: Sequence[str]) -> dict[str, Path]:
    """Return the directories by name. Raises ConfigError, which lists everything that is wrong."""
    places: dict[str, Path] = {}
    problems = []
    for each in compared:
        name, equals, place = each.partition("=")
        if not (name and equals and place):
            problems.append(f"{each!r} must be NAME=DIRECTORY")
        elif name in places or name == BASE:
            problems.append(f"the name {name!r} is taken")
        places[name] = Path(place)
    if problems:
        raise ConfigError(f"--compare cannot be followed: {'; '.join(problems)}.")
    return places


def table(said: dict[str, str]) -> Table:
    """Return answers in columns, the words marked that not every other answer has there."""
    shown = Table(show_edge=False, pad_edge=False, expand=True, header_style="bold")
    for name in said:
        shown.add_column(Text(name), ratio=1, overflow="fold")
    shown.add_row(*marked(list(said.values())))
    return shown


def marked(texts: Sequence[str]) -> list[Text]:
    """Return the texts with each word marked that the first does not have at its place; of the
    first, those that any of the others lacks."""
    words = [_words(text) for text in texts]
    common = [
        SequenceMatcher(None, words[0], other, autojunk=False).get_matching_blocks()
        for other in words[1:]
    ]
    kept = [set(range(len(words[0]))), *(set[int]() for _ in common)]
    for number, blocks in enumerate(common, 1):
        kept[0] &= {b.a + i for b in blocks for i in range(b.size)}
        kept[number] = {b.b + i for b in blocks for i in range(b.size)}
    return [
        Text("").join(
            Text(word, style="" if i in same or not word.strip() else DIFFERS)
            for i, word in enumerate(each)
        )
        for each, same in zip(words, kept, strict=True)
    ]


def _words(text: str) -> list[str]:
    """Return words and the white space between them, which together are the text."""
    edges = [0]
    for i, (a, b) in enumerate(pairwise(text), 1):
        if a.isspace() != b.isspace():
            edges.append(i)
    return [text[a:b] for a, b in pairwise([*edges, len(text)])]
