"""What a run says of losses that stand out, of numbers that are not finite, and of its base."""

import math
import random
from dataclasses import replace

import pytest
import torch

import veneer
from support.random_adapters import same, trained_weights
from support.runs import COURSE, ROWS, new_model, of, run
from support.tiny_models import quantized
from training.test_skips import spoil
from veneer.errors import DivergedError, TrainingError
from veneer.models.fingerprint import base_parameters
from veneer.training import frozen
from veneer.training.events import Checkpointed, Event, Notice, Skipped, Step
from veneer.training.frozen import FrozenBase
from veneer.training.spikes import FEWEST, usual_and_most

LONG = replace(COURSE, steps=FEWEST + 9, schedule="constant", lr=1e-4)
SPIKE = FEWEST + 4  # the pass, from 0, whose loss stands out


# Losses that stand out.


def test_few_losses_say_nothing():
    assert usual_and_most([1.0] * (FEWEST - 1))[1] == math.inf
    assert usual_and_most([1.0] * FEWEST) == (1.0, 1.5)


def test_spikes_do_not_hide_one_another():
    noise = random.Random(0)
    losses = [2 + noise.gauss(0, 0.1) for _ in range(64)]
    usual, most = usual_and_most(losses)
    assert abs(usual - 2) < 0.1
    assert max(losses) < most < 3.5
    spoilt = losses[:50] + [1e9] * 14  # a mean and its deviation would follow these
    assert usual_and_most(spoilt)[1] < 4
    assert usual_and_most([*losses, math.nan, math.inf]) == (usual, most)


def test_of_losses_that_fall_none_stands_out():
    losses = [5 * math.exp(-step / 20) + 0.01 * (step % 3) for step in range(200)]
    for step in range(FEWEST, 200):
        assert losses[step] <= usual_and_most(losses[:step])[1]


def spiked(monkeypatch, on_spike: str, count: int = 1, **more) -> tuple[list[Event], list]:
    spoil(monkeypatch, lambda number, batch: SPIKE <= number < SPIKE + count, 30.0)
    model, weights, events = new_model(), [], []
    for event in veneer.train(model, ROWS, replace(LONG, on_spike=on_spike, **more)):
        if isinstance(event, Step | Skipped):
            weights.append(trained_weights(model))
        events.append(event)
    return events, weights


def test_a_spike_is_said_once(monkeypatch):
    events, weights = spiked(monkeypatch, "warn")
    (notice,) = (e for e in of(Notice, events) if "usual" in e.text)
    assert notice.text.startswith(f"The loss of step {SPIKE + 1} is ")
    assert "row:" in notice.text
    assert not of(Skipped, events)
    assert not same(weights[SPIKE], weights[SPIKE - 1])


def test_a_spike_is_left_out_if_asked(monkeypatch):
    events, weights = spiked(monkeypatch, "skip")
    (skipped,) = of(Skipped, events)
    assert skipped.step == SPIKE + 1
    assert "is usual" in skipped.why
    assert same(weights[SPIKE], weights[SPIKE - 1])
    assert not same(weights[SPIKE + 1], weights[SPIKE])


def test_losses_that_stay_high_are_learnt_from(monkeypatch):
    events, _ = spiked(monkeypatch, "skip", count=5)
    steps = [event.step - SPIKE for event in of(Skipped, events)]
    assert steps == [1, 2, 4, 5]


def test_a_spike_ends_the_run_if_asked(monkeypatch, tmp_path):
    spoil(monkeypatch, lambda number, batch: number == SPIKE, 30.0)
    model, events = new_model(), []
    course = replace(LONG, on_spike="stop", save_every=FEWEST)
    with pytest.raises(DivergedError) as caught:
        events.extend(veneer.train(model, ROWS, course, directory=tmp_path))
    for says in (f"step {SPIKE + 1} is", "row:", "--on-spike stop", "The last good checkpoint is"):
        assert says in str(caught.value)
    assert len(of(Step, events)) == SPIKE


# The base.


def flip(tensor: torch.Tensor, byte: int = 3, bit: int = 4) -> None:
    data = tensor.detach().reshape(-1).view(torch.uint8)
    data[byte] ^= 1 << bit


@pytest.mark.parametrize("make", [new_model, lambda: quantized("llama")], ids=["dense", "nf4"])
def test_each_flipped_bit_is_seen(make, monkeypatch):
    model = make()
    if make is not new_model:
        veneer.attach(model, veneer.LoRA(rank=2))
    monkeypatch.setattr(frozen, "PIECE", 1000)
    base = FrozenBase(model)
    assert base.changed(all=True) == []
    pieces = {(piece.name, piece.start): piece for piece in base._pieces}
    generator = random.Random(0)
    for name, start in generator.sample(sorted(pieces), 30):
        piece = pieces[name, start]
        byte, bit = start + generator.randrange(piece.bytes), generator.randrange(8)
        flip(piece.tensor, byte, bit)
        assert base.changed(all=True) == [name]
        flip(piece.tensor, byte, bit)
    assert base.changed(all=True) == []


def test_checkpoints_look_at_all_pieces_in_turn(monkeypatch):
    model = new_model()
    monkeypatch.setattr(frozen, "PIECE", 1000)
    monkeypatch.setattr(frozen, "AT_ONCE", 5000)
    base = FrozenBase(model)
    flip(base_parameters(model)["model.layers.1.mlp.down_proj.weight"])
    looks = [base.changed() for _ in range(-(-base.bytes // 4000))]
    assert [] in looks
    assert ["model.layers.1.mlp.down_proj.weight"] in looks


@pytest.mark.parametrize("directory", [True, False])
def test_a_base_that_changes_ends_the_run_before_it_is_saved(directory, tmp_path):
    model, events = new_model(), []
    course = replace(COURSE, steps=6, save_every=2)

    def go() -> None:
        for event in veneer.train(model, ROWS, course, directory=tmp_path if directory else None):
            events.append(event)
            if isinstance(event, Step) and event.step == 3:
                flip(base_parameters(model)["model.layers.0.self_attn.q_proj.weight"])

    with pytest.raises(TrainingError, match=r"q_proj\.weight has changed since the run") as caught:
        go()
    assert [event.step for event in of(Checkpointed, events)] == ([2] if directory else [])
    assert ("step-000002" in str(caught.value)) == directory


# Numbers that are not finite.


def test_a_base_that_is_not_finite_is_named_at_once():
    model = new_model()
    with torch.no_grad():
        base_parameters(model)["model.layers.1.mlp.up_proj.weight"][2, 3] = math.inf
    with pytest.raises(TrainingError, match=r"in model\.layers\.1\.mlp\.up_proj\.weight: nothing"):
        run(model, replace(COURSE, steps=9))


def test_the_state_that_is_not_finite_is_named():
    model, events = new_model(), []
    weight = model.model.layers[0].self_attn.v_proj.adapters["default"].lora_A

    def go() -> None:
        for event in veneer.train(model, ROWS, replace(COURSE, steps=9)):
            events.append(event)
            if isinstance(event, Step):
                with torch.no_grad():
                    weight.fill_(math.nan)

    with pytest.raises(DivergedError, match=r"Not finite: [^ ]*v_proj[^ ]*lora_A") as caught:
        go()
    assert len(of(Step, events)) == 1
    assert caught.value.exit_code == 3


def test_the_row_that_is_not_finite_is_named(monkeypatch):
    bad = max(ROWS, key=lambda row: len(row.tokens))
    spoil(monkeypatch, lambda number, batch: len(bad.tokens) in list(batch.lengths))
    course = replace(COURSE, steps=9, tokens_per_step=1000)
    with pytest.raises(DivergedError, match=f"Not finite: the loss of {bad.where} by itself"):
        run(new_model(), course)
