"""Answers from slots, as on a card, are those of transformers' own loop."""

from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from support.every_architecture import small
from support.random_adapters import shake, tokenizer
from support.recorders import StandIn
from support.tiny_models import VOCAB, tiny
from veneer.generate import decode
from veneer.generate.in_slots import InSlots, in_slots
from veneer.generate.sampling import Sampling
from veneer.generate.slots import NotInSlots, SlotModel
from veneer.kernels.graphs import Graphs

QUESTIONS = ["abc", "defghi", "k", "lmnopqrst"]


@pytest.fixture
def by_slots(monkeypatch):
    """Let answers come from slots, by what plays the part of graphs."""

    def slots(model: Any, rows: int) -> InSlots:
        return InSlots(model, rows, Graphs(StandIn()))

    monkeypatch.setattr(decode, "in_slots", slots)


def adapted(architecture: str) -> Any:
    model = tiny(architecture)
    return shake(veneer.attach(model, veneer.LoRA(rank=2, dora=True, targets="all")), size=0.3)


@pytest.mark.parametrize("ends", [pytest.param(False, marks=pytest.mark.slow), True])
def test_answers_are_those_of_transformers(ends, monkeypatch, request):
    model, by_character = adapted("llama"), tokenizer(VOCAB)
    sampling = Sampling(max_new_tokens=10)
    model.generation_config.eos_token_id = None
    if ends:
        model.generation_config.eos_token_id = list(range(3, VOCAB, 2))
    expected = veneer.answers(model, by_character, QUESTIONS, sampling=sampling, batch=3)
    pieces = "".join(veneer.stream(model, by_character, QUESTIONS[1], sampling=sampling))
    request.getfixturevalue("by_slots")
    assert veneer.answers(model, by_character, QUESTIONS, sampling=sampling, batch=3) == expected
    assert "".join(veneer.stream(model, by_character, QUESTIONS[1], sampling=sampling)) == pieces
    early: list[int] = []
    ready = decode.answers_as_ready(
        model, by_character, QUESTIONS, sampling=sampling, early=lambda i, _: early.append(i)
    )
    assert [answer.text for _, answer in sorted(ready)] == expected
    assert bool(early) == ends


@pytest.mark.usefixtures("by_slots")
def test_draws_repeat_with_their_seed():
    model, by_character = adapted("llama"), tokenizer(VOCAB)
    sampling = Sampling(max_new_tokens=10, temperature=1.5, top_k=30, seed=5)
    first = veneer.answers(model, by_character, QUESTIONS, sampling=sampling)
    assert first == veneer.answers(model, by_character, QUESTIONS, sampling=sampling)
    assert first != veneer.answers(model, by_character, QUESTIONS, sampling=Sampling(10, 1.5))


def test_what_slots_do_not_suit():
    assert in_slots(tiny("llama"), 2) is None  # on a CPU nothing waits
    model = tiny("llama")
    model.generation_config.repetition_penalty = 1.3
    with pytest.raises(NotInSlots, match="repetition_penalty"):
        InSlots(model, 2)
    model = veneer.attach(tiny("llama"), veneer.Method("prefix", virtual_tokens=3))
    with pytest.raises(NotInSlots, match="virtual tokens"):
        InSlots(model, 2)
    with pytest.raises(NotInSlots, match="windows from the end"):
        InSlots(small("gpt_neo"), 2)
    with pytest.raises(NotInSlots, match="takes no masks"):  # for more places than its context has
        InSlots(small("mpt"), 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_proven_too(dtype, monkeypatch):
    """By a bound of their own, that a row which sees too little does not keep to."""
    model = tiny("llama", dtype=dtype)
    SlotModel(model, 2, 64)
    monkeypatch.setattr(SlotModel, "_masks", sees_itself_alone)
    with pytest.raises(NotInSlots, match="something else"):
        SlotModel(model, 2, 64)


def sees_itself_alone(self: SlotModel, positions: Tensor) -> Tensor:
    places = torch.arange(self.where.end)
    return places == positions[:, None, :, None]


def test_a_row_ends_while_others_go_on():
    model = tiny("llama")
    slots = InSlots(model, 2, Graphs(None))
    prompts = [[3, 4, 5], [6, 7, 8, 9]]
    rows = slots.answers(prompts, Sampling(max_new_tokens=6), ends=())
    with torch.no_grad():
        for prompt, row in zip(prompts, rows, strict=True):
            own = model.generate(
                torch.tensor([prompt]), max_new_tokens=6, eos_token_id=None, do_sample=False
            )
            assert own[0, len(prompt) :].tolist() == row
    cut = slots.answers(prompts, Sampling(max_new_tokens=6), ends={rows[0][2]})
    assert cut[0] == rows[0][: rows[0].index(rows[0][2]) + 1]
