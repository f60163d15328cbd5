"""`veneer combine`, `extract`, `diff` and `inspect` of an adapter, from the flags to the files."""

import re

import pytest
import torch

import veneer
from support.adapter_states import add_to, model_with, states_of, whole, written
from support.random_adapters import copy_of, logits
from support.tiny_models import tiny
from veneer.adapter.config import LoRA
from veneer.cli.app import run
from veneer.formats.adapters import read, write


@pytest.fixture
def adapters(tmp_path):
    """Two adapters over one base, on disk: one in our own format, one in PEFT's."""
    model = model_with("llama", LoRA(rank=2, targets="attention"), LoRA(rank=3, targets="all"))
    places = tmp_path / "a", tmp_path / "b"
    for state, place, format in zip(states_of(model), places, ("native", "peft"), strict=True):
        write(state, place, format=format)
    return places


@pytest.mark.parametrize("weights", [["--weights", "0.7,-0.3"], ["--weights=-0.3,0.7"], []])
def test_combine_writes_the_weighted_sum(adapters, weights, tmp_path, shown):
    for format in ("native", "peft"):
        out = tmp_path / "out" / format
        output = shown("combine", *adapters, out, *weights, "--format", format)
        assert "2 adapters by sum" in output
        assert "100.00% of the change kept" in output
        assert str(out) in output
        factors = [float(x) for x in weights[-1].split("=")[-1].split(",")] if weights else [1, 1]
        model = tiny("llama")
        veneer.load(model, out)
        mixed = tiny("llama")
        for name, place in zip("ab", adapters, strict=True):
            veneer.load(mixed, place, name=name)
        veneer.use(mixed, dict(zip("ab", factors, strict=True)))
        torch.testing.assert_close(logits(model), logits(mixed), rtol=1e-5, atol=1e-5)


def test_what_a_format_says_in_another_way_is_noted(
    adapters, models, tmp_path, monkeypatch, capsys
):
    def noted(state, place, *, format):
        return [f"{format} has no place for it.", *write(state, place, format=format)]

    monkeypatch.setattr("veneer.formats.adapters.write", noted)
    for name, arguments in (("c", ["combine", *adapters]), ("e", ["extract", *models])):
        flags = ["--rank", "1"] if name == "e" else []
        assert run([*map(str, [*arguments, tmp_path / name]), *flags, "--format", "peft"]) == 0
        assert "note peft has no place for it." in capsys.readouterr().err


@pytest.mark.parametrize("method", ["svd", "ties", "dare", "dare_ties", "magnitude_prune"])
def test_combine_cuts_to_a_rank_and_says_what_is_kept(adapters, method, tmp_path, shown):
    out = tmp_path / "out"
    flags = ["--method", method, "--rank", 2] + (["--density", 0.5] if method != "svd" else [])
    output = shown("combine", *adapters, out, *flags)
    assert re.search(r"\b2: \d+\.\d%", output)
    assert {len(layer.A) for layer in read(out).layers()} == {2}
    kept = re.search(r"([\d.]+)% of the change kept", output)
    assert kept
    assert 20 < float(kept[1]) < 100


def test_combine_says_what_is_wrong(adapters, tmp_path, refused):
    a, b = adapters
    assert "then the directory" in refused("combine", a)
    assert "holds something already" in refused("combine", a, b)  # no place for the result
    assert "2 adapters, but 1 weights" in refused("combine", a, b, "out", "--weights", "1")
    assert "numbers such as" in refused("combine", a, b, "out", "--weights", "1;2")
    assert "needs a rank" in refused("combine", a, b, "out", "--method", "ties")
    assert "--method" in refused("combine", a, b, "out", "--method", "tie")
    assert "no adapter directory" in refused("combine", a, "nowhere", "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def models(tmp_path):
    base = tiny("llama")
    generator = torch.Generator().manual_seed(0)
    change = {
        "model.layers.0.self_attn.q_proj.weight": 0.02 * torch.randn(32, 32, generator=generator),
        "model.layers.1.self_attn.q_proj.weight": 0.02 * torch.ones(32, 32),
        "model.norm.weight": 0.1 * torch.ones(32),
    }
    return written(base, tmp_path / "base"), written(
        add_to(copy_of(base), change), tmp_path / "tuned"
    )


def test_extract_writes_the_adapter_and_says_what_it_keeps(models, tmp_path, shown):
    out = tmp_path / "out"
    output = shown("extract", *models, out, "--energy", "0.8")
    assert re.search(r"1: 100\.0%", output)
    assert "model.norm.weight, changed by 10.00% of its size" in output
    assert "2 layers have an adapter, of rank 1 to" in output
    state = read(out)
    assert state.config.rank_of("model.layers.1.self_attn.q_proj") == 1
    base = veneer.load_base(models[0], dtype="float32")
    veneer.load(base.model, out, tokenizer=base.tokenizer)
    output = shown("extract", *models, tmp_path / "p", "--rank", "4", "--format", "peft")
    assert "of rank 4," in output
    assert (tmp_path / "p" / "adapter_config.json").is_file()


def test_extract_says_what_is_wrong(models, tmp_path, refused, shown):
    base, tuned = models
    assert "a rank or an energy" in refused("extract", base, tuned, "out")
    assert "nothing to extract" in refused("extract", base, base, "out", "--rank", 2)
    assert "holds something" in refused("extract", base, tuned, base, "--rank", 2)
    assert "no such directory" in refused("extract", base, "none", "out", "--rank", 2)
    other = written(tiny("llama", seed=1), tmp_path / "other")
    assert "force" in refused("extract", base, other, "out", "--rank", 2)
    assert shown("extract", base, other, "out", "--rank", 2, "--force")


def test_inspect_tells_an_adapter_from_a_model(adapters, models, tmp_path, refused, shown):
    for place, rank in zip(adapters, (2, 3), strict=True):
        output = shown("inspect", place)
        layers = list(whole(read(place)).values())
        assert f"{len(layers)} layers of" in output
        assert f"rank {rank}," in output
        total = sum(float(x.norm()) ** 2 for x in layers) ** 0.5
        assert f"‖ΔW‖ {total:.4g} over all" in output
        assert "q_proj" in output
        assert f"{float(layers[0].norm()):.3g} (" in output
    assert "parameters train" in shown("inspect", models[0], "--targets", "all")
    assert "is an adapter" in refused("inspect", adapters[0], "--rank", 4)
    assert "--picture" in refused("inspect", models[0], "--picture", "x.png")
    assert "no such directory" in refused("inspect", tmp_path / "none")


def test_diff_shows_angles_and_lengths(adapters, refused, shown):
    a, b = adapters
    output = shown("diff", a, a)
    assert "+1.000" in output
    assert "cosine +1.0000 over all" in output
    output = shown("diff", a, b)
    assert "14 layers, 8 of them in both" in output
    assert str(a) in output.replace("\n", "")
    assert "no adapter directory" in refused("diff", a, "nowhere")


def test_pictures_are_drawn_and_other_names_refused(adapters, tmp_path, refused, shown):
    matplotlib = pytest.importorskip("matplotlib.image")
    for arguments in (["inspect", adapters[0]], ["diff", *adapters]):
        picture = tmp_path / "deep" / f"{arguments[0]}.png"
        assert str(picture) in shown(*arguments, "--picture", picture)
        pixels = matplotlib.imread(picture)[..., :3]
        assert pixels.shape[0] > 100
        # Fields differ in grey too, for who has no colours.
        assert pixels.mean(-1).std() > 0.1
        assert ".png" in refused(*arguments, "--picture", tmp_path / "x.txt")


def test_dora_and_brackets_are_shown_as_they_are(tmp_path, capsys, refused):
    (state,) = states_of(model_with("llama", LoRA(rank=2, dora=True)))
    place = tmp_path / "[bold]"
    write(state, place)
    capsys.readouterr()
    assert run(["inspect", str(place)]) == 0
    printed = capsys.readouterr()
    assert "[bold]" in "".join(printed.out.split())  # a long path is wrapped
    assert "DoRA: B A is measured" in printed.err
    assert "of full rank" in refused("combine", place, place, "out")


def test_inspect_says_from_where_on_an_adapter_acts(tmp_path, capsys):
    (state,) = states_of(model_with("llama", LoRA(rank=2, invocation=(5, 9))))
    write(state, tmp_path / "adapter")
    assert run(["inspect", str(tmp_path / "adapter")]) == 0
    notice = " ".join(capsys.readouterr().err.split())
    assert "acts from the last occurrence of the tokens 5, 9 on alone" in notice
