"""Law 3 by the ways of a card, all at once: its kernels interpreted, and the flash kernel by its
formula. Whole passes of training give the gradients of plain autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from support.closeness import assert_gradients_no_further
from support.every_architecture import OFTEN
from support.flash_by_formula import CARD, flash_by_formula
from support.interpreted import INTERPRETED, MARKS
from support.plain import plain_pair
from support.small_kinds import MIXTURES, ROWS, SmallKind, gradients
from veneer.kernels import choice, native

pytestmark = [
    *MARKS,
    pytest.mark.slow,
    pytest.mark.skipif(
        not INTERPRETED, reason="kernels run on the card; TRITON_INTERPRET=1 interprets them"
    ),
]
# Liger's kernels take more than the interpreter has (tests/kernels/test_card_norm.py).
HOPPER = replace(CARD, triton=True)


@pytest.fixture
def ways(monkeypatch):
    """Let everything choose as on a card, and return the ways that it chooses."""
    monkeypatch.setattr(native, "_kernel", lambda *_: None)
    monkeypatch.setattr(choice, "device_of", lambda device: HOPPER)
    monkeypatch.setattr(choice, "HALVES", (torch.float16, torch.bfloat16, torch.float32))
    attention, elementwise = choice.attention, choice.elementwise
    ways: set[str] = set()

    def noted(way: Any) -> Any:
        ways.add(way)
        return way

    def attention_here(*args: Any, softcap: bool, **options: Any) -> choice.AttentionWay:
        # FlexAttention has no gradient on a processor.
        return noted("groups" if softcap else attention(*args, softcap=softcap, **options))

    def experts_here(*_args: Any, quantized: bool) -> choice.ExpertsWay:
        return noted("loop" if quantized else "grouped")  # in float32 too

    monkeypatch.setattr(choice, "attention", attention_here)
    monkeypatch.setattr(choice, "experts", experts_here)
    monkeypatch.setattr(choice, "elementwise", lambda *args: noted(elementwise(*args)))
    with flash_by_formula():
        yield ways


@pytest.mark.parametrize("architecture", [*OFTEN, *MIXTURES])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gradients_by_the_ways_of_a_card(architecture, dora, ways):
    targets = "attention" if dora and architecture in MIXTURES else "all"
    kind = SmallKind("small", architecture, lora={"targets": targets, "dora": dora})
    model = kind.shaken()
    plain, exact = plain_pair(kind, model)
    expected = exact.gradients(exact.loss(ROWS))
    assert_gradients_no_further(gradients(model), plain.gradients(plain.loss(ROWS)), expected)
    chosen = {"triton", "groups" if architecture == "gemma2" else "varlen"}
    assert ways >= chosen | ({"grouped"} if architecture in MIXTURES else set())
