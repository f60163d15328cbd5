"""Patterns match as in PEFT, and those that take too long are refused."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import veneer
from support.tiny_models import tiny
from veneer.adapter import patterns
from veneer.adapter.patterns import LONGEST_PATTERN, MOST_PATTERNS, Matcher
from veneer.adapter.targets import resolve
from veneer.errors import ConfigError

PATHS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.k_proj",
    "model.layers.1.mlp.up_proj",
    "transformer.h.1.attn.c_attn",
    "lm_head",
    "q_proj",
)
PATTERNS = (
    "q_proj",
    "self_attn.q_proj",
    "selfXattn.q_proj",
    "model.layers.0.self_attn.q_proj",
    "1.mlp.up_proj",
    "layers.1.mlp.up_proj",
    "proj",
    ".",
    "......",
    "",
    ".*",
    r".*\.1\..*",
    r"(q|k)_proj",
    r"layers\.\d+\.self_attn\.(?:q|k)_proj",
    "q_proj|k_proj",
    r"(?!.*lm_head).*",
    r"(?<!k)_proj",
    "q_proj\\Z",
    "(?i:Q_PROJ)",
    "c_attn$",
    "^lm_head",
    "é",
)
ENDLESS = (
    "(?:(?:(?:.?){20}){20}){20}[A-Z]",
    "((.)|(.)|(..))*[A-Z]",
    r"(.+)(.+)(.+)(.+)(.+)(.+)(.+)(.+)\8\7[A-Z]",
    "(((.|.)+)+)+[A-Z]",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_end_of_a_path_as_peft_matches_it(pattern):
    for path in PATHS:
        expected = re.match(rf"(.*\.)?({pattern})$", path) is not None
        assert Matcher().at_end(pattern, path) == expected, path
        assert Matcher().within(f"re:{pattern}", path) == bool(re.search(pattern, path)), path


@given(st.text("ab.", max_size=5), st.text("ab.", max_size=9))
def test_names_and_dots_are_the_expressions_that_they_look_like(pattern, path):
    expected = re.match(rf"(.*\.)?({pattern})$", path) is not None
    assert Matcher().at_end(pattern, path) == expected


@pytest.fixture
def _soon(monkeypatch):
    """What has no end is given up soon: each matcher would take all of its time."""
    monkeypatch.setattr(patterns, "MATCHING_SECONDS", 0.05)


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_without_end_end(pattern):
    began, matcher = time.process_time(), Matcher()
    for path in PATHS * 50:
        with pytest.raises(ConfigError, match="takes too long to match"):
            matcher.at_end(pattern, PATHS[1])
        with pytest.raises(ConfigError, match="takes too long"):  # from then on at once
            matcher.at_end("(x)", path)
    # Of the processor's time, so that a machine with other things to do counts for nothing.
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "pattern",
    ["(", "[", "(" * 5000, "a{99999999999}", "(?P<n>a)(?P<n>b)", "x)|(", "(?i)a", "*"],
)
def test_what_is_no_pattern_is_an_error_that_says_so(pattern):
    with pytest.raises(ConfigError, match="is no regular expression"):
        Matcher().at_end(pattern, "x.y")
    with pytest.raises(ConfigError, match="is no regular expression") as refused:
        veneer.LoRA(rank_pattern={pattern: 2})
    assert len(str(refused.value)) < 1000


def test_too_many_and_too_long():
    with pytest.raises(ConfigError, match="1,001 patterns are more than"):
        veneer.LoRA(rank_pattern={f"x*{i}": 2 for i in range(MOST_PATTERNS + 1)})
    veneer.LoRA(rank_pattern={f"layers.{i}.q_proj": 2 for i in range(3 * MOST_PATTERNS)})
    with pytest.raises(ConfigError, match="more than 20,000 characters"):
        veneer.LoRA(rank_pattern={"x*" * LONGEST_PATTERN: 2})


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize("pattern", ENDLESS)
def test_endless_patterns_in_every_place(pattern):
    model, began = tiny("llama"), time.process_time()
    with pytest.raises(veneer.TargetError, match="takes too long"):
        resolve(model, veneer.LoRA(targets=f"re:{pattern}"))
    with pytest.raises(veneer.TargetError, match="takes too long"):
        veneer.attach(model, veneer.LoRA(targets="all", alpha_pattern={pattern: 2}))
    config = veneer.LoRA(rank_pattern={pattern: 2})
    with pytest.raises(veneer.ConfigError, match="takes too long"):
        config.rank_of(PATHS[1])
    assert time.process_time() - began < 3
    assert not veneer.adapters(model)


def test_a_pattern_of_each_layer_of_a_large_model_is_quick_and_right():
    paths = [f"model.layers.{i}.mlp.{name}" for i in range(80) for name in ("up", "down", "gate")]
    config = veneer.LoRA(rank_pattern={path: n + 1 for n, path in enumerate(paths)})
    assert [config.rank_of(path) for path in paths] == list(range(1, len(paths) + 1))
    # Whether a dot is a dot or any character, the first pattern wins.
    both = veneer.LoRA(rank_pattern={"layers.1.up": 2, r"layers\.1\.up": 3, "up": 4})
    assert [both.rank_of(p) for p in ("x.layers.1.up", "x.layers.2.up", "x.layersx1.up")] == [
        2,
        4,
        2,
    ]
