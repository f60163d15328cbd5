"""An adapter of any format, a run and a checkpoint are taken wherever an adapter is, by the base
that they name."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import veneer
from support.random_adapters import examples, logits, shake, tokenizer
from support.tiny_models import tiny
from veneer.cli.app import run
from veneer.formats import native
from veneer.formats.adapters import read
from veneer.formats.locate import locate
from veneer.run_directory import RunDirectory
from veneer.serve.config import ServeConfig
from veneer.serve.page.about import about
from veneer.serve.run import prepare

STEPS = veneer.TrainConfig(
    steps=4, lr=0.5, tokens_per_step=20, warmup=0, eval_every=1, save_every=1
)
RUN = ("run", "run/checkpoints", "run/checkpoints/step-000003")
PLACES = ("native", "peft", "mlx", "loralib", "a.gguf", "ended", *RUN)
FLAGS = ("--dtype", "float32", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Any:
    """A base and one adapter over it in all places: learnt in three steps of four by a run, whose
    best step was the first."""
    home = tmp_path_factory.mktemp("places")
    base = home / "base"
    model = tiny("llama")
    model.generation_config.eos_token_id = None
    model.save_pretrained(base)
    tokenizer().save_pretrained(base)
    loaded = veneer.load_base(base, dtype="float32")
    model = shake(veneer.attach(loaded.model, veneer.LoRA(rank=2, targets="all"), seed=0), size=0.3)
    directory, step = RunDirectory(home / "run"), 0
    events = veneer.train(
        model,
        examples([9, 12, 10]),
        STEPS,
        # What training makes worse: other rows of random tokens.
        held_out=examples([40], seed=9),
        directory=directory.checkpoints,
        should_stop=lambda: step == 3,
    )
    bests = [0]
    for event in events:
        step = getattr(event, "step", step)
        bests += [step] * getattr(event, "best", False)
    directory.write_progress(steps=4, ended="interrupted")
    for format in ("native", "peft", "mlx", "loralib"):
        veneer.save(model, home / format, format=format)
    veneer.save(model, home / "a.gguf", format="gguf")
    shutil.copytree(home / "native", home / "ended" / "lora_adapter")
    state = read(home / "native")
    answer = veneer.answer(model, loaded.tokenizer, "Hello", sampling=veneer.Sampling(6))
    return SimpleNamespace(
        home=home,
        base=base,
        model=model,
        state=state,
        changes=changes_of(state),
        answer=f"{answer}\n",
        bests=bests,
    )


def changes_of(state: Any) -> dict[str, torch.Tensor]:
    scaling = state.config.scaling_of
    return {x.path: x.B @ x.A * scaling(x.path) for x in state.layers()}


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-4 * b.norm())


def test_python_and_the_server_take_each(places):
    expected = logits(places.model)
    for place in PLACES:
        loaded = veneer.load_base(places.base, dtype="float32")
        veneer.load(loaded.model, places.home / place)
        assert close(logits(loaded.model), expected), place
        assert locate(places.home / place).base == str(places.base)
    root = places.home / "root"
    root.mkdir()
    for place in PLACES:
        (root / Path(place).name).symlink_to(places.home / place)
    (root / "base").symlink_to(places.base)
    served, notices = prepare(
        veneer.load_base(places.base, dtype="float32"), (), ServeConfig(adapters_dir=root)
    )
    with served.engine:
        names = {Path(place).stem for place in PLACES}
        assert {*served.library.names()} == names
        for name in names:
            served.engine.load(name)
            assert about(served.library.info(name).directory, 0, served.computed_in)["base"] == str(
                places.base
            )
    assert any("no adapter in base" in notice for notice in notices)


@pytest.mark.parametrize("place", PLACES)
def test_every_command_takes_each(place, places, shown, tmp_path, monkeypatch):
    path = places.home / place
    assert shown("generate", "Hello", "--adapter", path, *FLAGS) == places.answer
    to = "peft" if place == "a.gguf" else "gguf"
    shown("convert", path, tmp_path / "converted", "--to", to)
    changes = changes_of(read(tmp_path / "converted"))
    assert changes.keys() == places.changes.keys()
    assert all(close(change, places.changes[layer]) for layer, change in changes.items())
    assert "14 layers" in shown("inspect", path)
    assert run(["check", str(path), "--for", "peft"]) == (place != "peft")
    if place in ("mlx", "a.gguf", "run"):  # where to look is the same function's for all others
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        assert places.answer in shown("chat", "--adapter", path, *FLAGS)
        assert "cosine +1.0000" in shown("diff", path, places.home / "native")
        shown("merge", path, tmp_path / "merged", "--dtype", "float32")
        merged = veneer.load_base(tmp_path / "merged", dtype="float32")
        assert close(logits(merged.model), logits(places.model))


def test_a_choice_is_said(places, shown, capsys):
    run(["generate", "Hello", "--adapter", str(places.home / "run"), *FLAGS])
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.count("The newest checkpoint in") == 1
    assert f"{places.home / 'run'} is taken, step 3 of 4." in printed
    assert f"The base is {places.base}" in printed
    with pytest.warns(veneer.VeneerWarning, match="step 3 of 4"):
        read(places.home / "run")


def test_what_cannot_be_told_is_one_error(places, refused, tmp_path):
    def error(path: Path, *arguments: Any) -> str:
        return refused("generate", "Hello", "--adapter", path, *arguments)

    (tmp_path / "empty").mkdir()
    assert "holds no adapter" in error(tmp_path / "empty")
    assert "is a model, and an adapter" in error(places.base)
    assert "did you mean 'native'?" in error(places.home / "nativ")
    assert "did you mean" not in error(places.home / "bas")  # no adapter is there
    several = error(places.home)
    assert "is no adapter itself; in it are" in several
    for place in ("a.gguf", "native", "ended/lora_adapter"):
        assert str(places.home / place) in several
    nameless = shutil.copytree(places.home / "peft", tmp_path / "nameless")
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": None})
    )
    assert "names none. Give MODEL." in error(nameless)
    (nameless / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "gone"})
    )
    assert "names its base, but: 'gone' is no model here" in error(nameless)
    assert "no checkpoint of step 9, but of" in refused(
        "export", places.home / "run", tmp_path / "out", "--step", 9
    )
    old = shutil.copytree(places.home / RUN[-1], tmp_path / "old")
    state = json.loads((old / "state.json").read_text())
    (old / "state.json").write_text(json.dumps({k: state[k] for k in state if k != "adapter"}))
    assert "does not say what its adapter is" in error(old)


def test_export_writes_the_weights_of_the_run_itself(places, shown, tmp_path):
    whole = shutil.copytree(places.home / "run", tmp_path / "run")
    shown("export", whole)
    last, best = read(whole / "lora_adapter"), places.bests[-1]
    assert all(torch.equal(own, last.tensors[key]) for key, own in places.state.tensors.items())
    assert (whole / "lora_adapter" / "tokenizer.json").is_file()
    assert last.base_fingerprint == {
        key: mark for key, mark in places.state.base_fingerprint.items() if key != "tokenizer"
    }
    shown("export", whole, tmp_path / "best", "--best")
    assert 0 < best < 3
    assert native.config_of(read(tmp_path / "best")) == native.config_of(last)
    shown("export", whole, tmp_path / "one", "--step", best, "--format", "peft")
    one = read(tmp_path / "one").tensors
    assert all(torch.equal(one[key], t) for key, t in read(tmp_path / "best").tensors.items())
    assert any(not torch.equal(one[key], t) for key, t in last.tensors.items())
