"""`veneer pretrain`: a MiniGPT from nothing."""

import pytest
import torch

from veneer.cli.app import run
from veneer.data.world import facts
from veneer.models.load import load_base
from veneer.training import pretrain as pretraining
from veneer.training.events import Step, Written
from veneer.training.pretrain import pretrain


@pytest.fixture
def short(monkeypatch):
    """Let the model read a few of its texts, most of which two steps would not come to."""
    monkeypatch.setattr(pretraining, "DOCUMENTS", 600)


def test_it_writes_exactly_three_files_with_their_checksums_and_says_so(short, tmp_path, capsys):
    assert run(["pretrain", str(tmp_path / "home"), "--steps", "2"]) == 0
    names = {path.name for path in (tmp_path / "home").iterdir()}
    assert names == {"config.json", "model.pt", "tokenizer.json", "SHA256SUMS"}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    printed = "".join(capsys.readouterr().out.split())
    assert str(tmp_path / "home") in printed
    assert "step2/2" in printed


def test_the_seed_alone_decides_the_model(short, tmp_path):
    runs = {}
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        events = list(pretrain(tmp_path / name, steps=2, seed=seed))
        losses = [event.loss for event in events if isinstance(event, Step)]
        assert isinstance(events[-1], Written)
        runs[name] = losses, torch.load(tmp_path / name / "model.pt", weights_only=True)
    assert runs["one"][0] == runs["same"][0] != runs["other"][0]
    one, same, other = (runs[name][1] for name in ("one", "same", "other"))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not any(
        torch.equal(one[key], other[key]) for key in one if key.endswith("q_proj.weight")
    )


def test_steps_that_cannot_be_are_refused(tmp_path, capsys):
    assert run(["pretrain", str(tmp_path / "home"), "--steps", "0"]) == 2
    assert "steps is 0" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def right_completions(home) -> float:
    """Return the share of the world's statements that the model completes rightly by itself."""
    base = load_base(home)
    model, tokenizer = base.model, base.tokenizer
    right = 0
    for fact in facts():
        inputs = tokenizer(fact.prompt, return_tensors="pt", add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
        right += text.startswith((f" {fact.value}.", f" {fact.value} "))
    return right / len(facts())


@pytest.mark.slow
def test_with_its_default_steps_it_knows_its_world(tmp_path):
    list(pretrain(tmp_path / "home"))
    assert right_completions(tmp_path / "home") >= 0.95
