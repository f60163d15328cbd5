"""Losses and gradients that are not finite, or too large."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from support.random_adapters import same, shake, trained_weights
from support.runs import COURSE, ROWS, new_model, of, run
from veneer.data.packing import StepOrder
from veneer.fused.forward import Forward
from veneer.training.events import Event, Skipped, Step


def spoil(monkeypatch: Any, when: Any, value: float = math.nan) -> None:
    """Let the loss of those training passes be `value` times itself for which `when` says so."""
    plain, passes = Forward.losses, iter(range(10_000))

    def losses(self: Forward, model: Any, batch: Any, *more: Any) -> Tensor:
        own = plain(self, model, batch, *more)
        return own * value if model.training and when(next(passes), batch) else own

    monkeypatch.setattr(Forward, "losses", losses)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(value, monkeypatch):
    spoil(monkeypatch, lambda number, batch: number == 1, value)
    model = new_model()
    weights: list[dict[str, Tensor]] = []
    events = []
    for event in veneer.train(model, ROWS, replace(COURSE, steps=3, schedule="constant")):
        events.append(event)
        weights.append(trained_weights(model))
        assert all(weight.grad is None for weight in model.parameters())
    assert [type(event) for event in events[1:4]] == [Step, Skipped, Step]
    assert same(weights[1], weights[2])
    assert not same(weights[2], weights[3])
    order = StepOrder([len(row.tokens) for row in ROWS], 30, 30, 0)
    rows = {ROWS[i].where for batch in order.epoch(0)[1] for i in batch}
    assert set(events[2].rows) == rows
    assert all(torch.isfinite(weight).all() for weight in weights[-1].values())


def test_one_bad_pass_of_several_spoils_its_step(monkeypatch):
    spoil(monkeypatch, lambda number, batch: number == 0)
    model = new_model()
    before = trained_weights(model)
    course = replace(COURSE, steps=1, tokens_per_step=1000, tokens_per_batch=20)
    events = run(model, course)
    assert [set(event.rows) for event in of(Skipped, events)] == [{row.where for row in ROWS}]
    assert same(trained_weights(model), before)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = new_model()
    before = trained_weights(model)
    weight = model.model.layers[0].mlp.up_proj.adapters["default"].lora_B
    weight.register_hook(lambda grad: grad * math.inf)
    events = run(model, replace(COURSE, steps=2))
    assert len(of(Skipped, events)) == 2
    assert same(trained_weights(model), before)


def test_three_in_a_row_end_the_run(monkeypatch, tmp_path):
    spoil(monkeypatch, lambda number, batch: number >= 2)
    model = new_model()
    events: list[Event] = []
    course = replace(COURSE, steps=9, save_every=1)
    with pytest.raises(veneer.TrainingError) as caught:  # DivergedError, which is one
        events.extend(veneer.train(model, ROWS, course, directory=tmp_path))
    assert len(of(Step, events)) == len(of(Skipped, events)) == 2
    message = str(caught.value)
    assert "3 steps in a row, up to step 5" in message
    assert "row:" in message
    assert message.index("--lr is 0.01") < message.index("row:")  # the likelier cause first
    assert "try 0.001." in message
    assert f"The last good checkpoint is {tmp_path / 'step-000002'}." in message
    assert caught.value.exit_code == 3
    assert not model.training


def test_of_a_low_rate_the_rows_and_the_dtype_are_suspected(monkeypatch):
    spoil(monkeypatch, lambda number, batch: True)
    with pytest.raises(veneer.TrainingError, match="which is low") as caught:
        run(new_model(), replace(COURSE, steps=9, lr=1e-5))
    assert "--dtype float32" in str(caught.value)
    assert "row:" in str(caught.value)
    assert "too high" not in str(caught.value)


def test_no_checkpoint_is_named_where_there_is_none(monkeypatch, tmp_path):
    spoil(monkeypatch, lambda number, batch: True)
    with pytest.raises(veneer.TrainingError) as caught:
        list(veneer.train(new_model(), ROWS, replace(COURSE, steps=9), directory=tmp_path))
    assert "checkpoint" not in str(caught.value)


def test_others_between_them_let_the_run_go_on(monkeypatch):
    spoil(monkeypatch, lambda number, batch: number % 3 != 2)
    events = run(new_model(), replace(COURSE, steps=9))
    assert len(of(Skipped, events)) == 6
    assert len(of(Step, events)) == 3


@pytest.mark.parametrize("clip", [0, 1e-3, 1e6])
def test_clipping(clip, monkeypatch):
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        grads = [w.grad for group in self.param_groups for w in group["params"]]
        norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run(shake(new_model()), replace(COURSE, steps=2, clip=clip))
    if clip == 1e-3:
        assert norms == pytest.approx([clip] * len(norms), rel=1e-2)
    else:
        plain = list(norms)
        norms.clear()
        run(shake(new_model()), replace(COURSE, steps=2))
        assert plain == norms
        assert min(norms) > 0.01
