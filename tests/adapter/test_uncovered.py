"""Users learn what `all` and `mlp` do not reach: from attach, from a run, and from inspect."""

import warnings

import pytest

import veneer
from support import tiny_models
from support.tiny_models import tiny
from veneer.adapter.report import report_targets
from veneer.adapter.targets import uncovered
from veneer.cli.app import app

ROUTER = "stay as they are: mlp.gate.weight."


@pytest.mark.parametrize("targets", ["all", "attention,mlp"])
@pytest.mark.parametrize("architecture", ["qwen2_moe"])
def test_attaching_warns_of_routers(architecture, targets):
    model = tiny(architecture)
    with pytest.warns(veneer.VeneerWarning) as caught:
        veneer.attach(model, veneer.LoRA(rank=2, targets=targets))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(caught[0].message).endswith(ROUTER)
    assert report_targets(model, veneer.LoRA(rank=2, targets=targets)).uncovered == str(
        caught[0].message
    )


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        ("qwen2_moe", "attention"),
        ("mixtral", "q_proj"),
        *[(a, "all") for a in tiny_models.ARCHITECTURES],
    ],
)
def test_no_warning_where_nothing_stays_uncovered(architecture, targets):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        veneer.attach(tiny(architecture), veneer.LoRA(rank=2, targets=targets))


def test_the_share_is_of_the_adapted_blocks():
    model = tiny("mixtral")
    block = model.model.layers[1]
    share = block.mlp.gate.weight.numel() / sum(w.numel() for w in block.parameters())
    text = uncovered(model, veneer.LoRA(targets="all", layers="1"))
    assert text is not None
    assert f" {share:.2%} " in text


def test_a_router_that_is_named_is_covered():
    assert uncovered(tiny("mixtral"), veneer.LoRA(targets="all,mlp.gate.weight")) is None


def test_quantized_layers_count_as_dense_ones():
    assert uncovered(tiny_models.quantized("llama"), veneer.LoRA(targets="all")) is None


@pytest.fixture
def mixture(tmp_path):
    from support.random_adapters import tokenizer

    tiny("mixtral").save_pretrained(tmp_path / "mixture")
    tokenizer().save_pretrained(tmp_path / "mixture")
    return str(tmp_path / "mixture")


def test_inspect_warns(mixture, capsys):
    app(["inspect", mixture, "--targets", "all"], exit_on_error=False, result_action="return_value")
    assert ROUTER in " ".join(capsys.readouterr().out.split())


def test_a_run_has_a_notice(mixture, tmp_path):
    rows = tmp_path / "rows.txt"
    rows.write_text("a lamp is a lamp\n\nthe mill is old\n")
    recipe = veneer.Recipe(
        model=mixture,
        data=rows,
        out=tmp_path / "out",
        dtype="float32",
        lora=veneer.LoRA(rank=2, targets="all"),
        training=veneer.TrainConfig(steps=1),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", veneer.VeneerWarning)
        notes = [e.text for e in veneer.tune(recipe) if type(e).__name__ == "Notice"]
    assert any(note.endswith(ROUTER) for note in notes)
