"""Names that will go: each warns once, and does what the name that takes its place does."""

import re
from pathlib import Path

import pytest
import torch

import veneer
from support.random_adapters import NEW_TOKENS, tokenizer
from support.tiny_models import tiny
from veneer.errors import VeneerDeprecation, VeneerWarning, deprecated

ROOT = Path(__file__).parents[1]


def test_a_name_is_warned_of_once_where_it_is_called():
    deprecated.cache_clear()

    def old() -> None:
        deprecated("veneer.old", since="0.3", use="veneer.new")

    def ask_twice() -> None:
        old()
        old()

    with pytest.warns(VeneerDeprecation, match="veneer.old.*since Veneer 0.3.*veneer.new") as seen:
        ask_twice()
    assert [warning.filename for warning in seen] == [__file__]
    assert issubclass(VeneerDeprecation, VeneerWarning)  # the command line shows it as a notice


def test_the_page_of_versions_lists_what_is_deprecated():
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\S+)` \| (\S+) \| `(\S+)` \|$", page, re.MULTILINE))
    call = re.compile(r'deprecated\("(\S+)", since="(\S+)", use="(\S+)"\)')
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    assert {names for text in sources for names in call.findall(text)} == listed


def test_add_words_is_add_tokens():
    deprecated.cache_clear()
    (model, tokens), (other, others) = ((tiny("qwen2"), tokenizer()) for _ in range(2))
    with pytest.warns(VeneerDeprecation, match="add_tokens"):
        rows = veneer.add_words(model, tokens, NEW_TOKENS).embedding.rows
    assert torch.equal(rows, veneer.add_tokens(other, others, NEW_TOKENS).embedding.rows)
