"""Law 6, where nothing can be resumed: another run, or one whose steps were all skipped."""

import json
from typing import Any

import pytest
from torch import Tensor

import veneer
from support.interrupted import COURSE, ROWS, Run
from support.random_adapters import same, trained_weights
from support.tiny_models import tiny
from veneer.checksums import SUMS
from veneer.training import checkpoint
from veneer.training.events import Checkpointed, Skipped, Stopped


def test_steps_that_were_skipped_in_a_row_are_remembered(tmp_path, monkeypatch):
    from veneer.fused.forward import Forward

    call: Any = Forward.losses

    def spoilt(self: Forward, model: Any, *batch: Any) -> Tensor:
        losses: Tensor = call(self, model, *batch)
        return losses * float("nan") if model.training else losses

    monkeypatch.setattr(Forward, "losses", spoilt)
    run = Run(tmp_path, COURSE, held_out=())
    run.go(resume=False, stop_at=2)
    kinds = [type(event) for event in run.events[1:]]
    assert kinds == [Skipped, Skipped, Checkpointed, Stopped]
    with pytest.raises(veneer.TrainingError, match="in 3 steps in a row, up to step 3") as caught:
        run.go(resume=True)
    assert "checkpoint" not in str(caught.value)  # that of step 2 is no good one


def test_another_run_is_refused(tmp_path):
    identity = {"data": "abc", "rank": 4, "base": "x"}
    run = Run(tmp_path, COURSE, identity=identity)
    run.go(resume=False, stop_at=2)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = Run(tmp_path, COURSE, identity={"data": "abd", "rank": 4, "words": "y"})
    with pytest.raises(veneer.TrainingError) as caught:
        other.go(resume=True)
    message = str(caught.value)
    for key in ("data", "base", "words"):
        assert key in message
    assert "'abc' there, 'abd' here" in message
    assert "rank" not in message
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    run.go(resume=True)


@pytest.mark.parametrize("identity", [None, "abc"])
def test_a_checkpoint_without_an_identity_is_refused(identity, tmp_path):
    run = Run(tmp_path, COURSE)
    run.go(resume=False, stop_at=2)
    state = tmp_path / "checkpoints" / "step-000002" / checkpoint.STATE
    numbers = json.loads(state.read_text())
    state.write_text(json.dumps({**numbers, "identity": identity}))
    (state.parent / SUMS).unlink()
    with pytest.raises(veneer.TrainingError, match=r"step-000002.*'identity'.*--force"):
        run.go(resume=True)


@pytest.mark.parametrize("rank", [3, 2])
def test_another_adapter_is_refused(rank, tmp_path):
    Run(tmp_path, COURSE).go(resume=False, stop_at=2)
    model = tiny("llama")
    targets = "qv" if rank == 3 else "mlp"
    veneer.attach(model, veneer.LoRA(rank=rank, targets=targets), seed=0)
    before = trained_weights(model)
    with pytest.raises(veneer.TrainingError, match="another"):
        list(veneer.train(model, ROWS, COURSE, directory=tmp_path / "checkpoints", resume=True))
    assert same(trained_weights(model), before)
