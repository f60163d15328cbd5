"""Law 5 between formats: whatever goes from one into another answers as before, or is refused."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ConvNextConfig, ConvNextForImageClassification

import veneer
from support.closeness import assert_same_logits
from support.random_adapters import distance, ids, logits, shake, targets_named
from support.tiny_models import tiny
from veneer.formats import table as formats
from veneer.formats.base_structure import BaseStructure
from veneer.formats.capture import capture
from veneer.formats.convert import by_path, convert
from veneer.formats.options import FormatOptions

FORMATS = ("native", "peft", "mlx", "loralib")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "alpha": ("mistral", {"alpha": 2.5, "dropout": 0.25}),
    "rslora": ("qwen2", {"rslora": True, "alpha": 3, "targets": "all"}),
    "patterns": (
        "qwen3",
        {
            "targets": "all",
            "rank_pattern": {r".*\.1\..*": 5},
            "alpha_pattern": {r".*\.0\..*": 2.5},
        },
    ),
    "patterns with rslora": ("llama", {"rslora": True, "rank_pattern": {"q_proj": 4}}),
    "one block": ("llama", {"layers": "-1", "targets": "mlp"}),
    "conv1d": ("gpt2", {"targets": "all"}),
    "embedding": ("qwen2", {"targets": "everything"}),
    "head": ("qwen3", {"targets": "lm_head"}),
    "pissa": ("llama", {"init": "pissa", "targets": "all"}),
    "olora": ("gpt2", {"init": "olora"}),
    "pissa with patterns": ("llama", {"init": "pissa", "rank_pattern": {"q_proj": 4}}),
    "activated": ("llama", {"targets": "all", "invocation": ids()[0, 4:6].tolist()}),
    "dora": ("llama", {"dora": True, "targets": "all"}),
    "dora with patterns": ("gpt2", {"dora": True, "alpha_pattern": {r".*\.0\..*": 7}}),
}
REFUSED = {
    "activated": {"mlx", "loralib"},
    "dora": {"loralib"},
    "dora with patterns": {"loralib"},
}


def adapted(case: str) -> Any:
    architecture, options = CASES[case]
    model = tiny(architecture)
    options = {"rank": 3, "targets": "attention"} | options
    options["targets"] = targets_named(model, options["targets"])
    return shake(veneer.attach(model, veneer.LoRA(**options), seed=3))


# Where an adapter of MLX means nothing without its base: outside of model.layers.
NEEDS_BASE = {"conv1d", "embedding", "head", "olora", "dora with patterns"}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_every_format_into_every_other(case, every, tmp_path):
    """Each case goes into one of the formats from all, and into none that refuses it; into every
    one among the slow proofs."""
    architecture, _ = CASES[case]
    in_turn = FORMATS[[*CASES].index(case) % len(FORMATS)]
    model, base = adapted(case), tiny(architecture)
    assert distance(logits(model), logits(base)) > 0.01
    expressible = [name for name in FORMATS if name not in REFUSED.get(case, ())]
    for name in expressible:
        veneer.save(model, tmp_path / name, format=name)
    for start, end in itertools.product(expressible, FORMATS):
        out = tmp_path / f"{start} to {end}"
        if end in expressible:
            if not every and end != in_turn:
                continue
            convert(tmp_path / start, out, to=end, base=base)
            again = veneer.load(tiny(architecture), out)
            assert_same_logits(logits(again), model, logits)
        else:
            with pytest.raises(veneer.AdapterError, match="has no place for"):
                convert(tmp_path / start, out, to=end, base=base)


@pytest.mark.parametrize("case", CASES)
def test_without_a_base_where_the_files_say_enough(case, tmp_path):
    architecture, _ = CASES[case]
    model = adapted(case)
    veneer.save(model, tmp_path / "native")
    for end in {"peft", "mlx", "loralib"} - REFUSED.get(case, set()):
        if end == "mlx" and case in NEEDS_BASE:
            with pytest.raises(veneer.AdapterError, match="depends on the base; name it"):
                convert(tmp_path / "native", tmp_path / end, to=end)
        else:
            convert(tmp_path / "native", tmp_path / end, to=end)
            again = veneer.load(tiny(architecture), tmp_path / end)
            assert_same_logits(logits(again), model, logits)


@pytest.mark.parametrize("case", ["plain", "alpha", "rslora", "one block", "embedding"])
def test_there_and_back_is_the_same(case, tmp_path):
    architecture, _ = CASES[case]
    model = adapted(case)
    here = capture(model)
    base = tiny(architecture)
    for format in FORMATS:
        veneer.save(model, tmp_path / format, format=format)
        convert(tmp_path / format, tmp_path / f"{format} back", to="native", base=base)
        back = formats.read(tmp_path / f"{format} back", FormatOptions())
        assert back.tensors.keys() == here.tensors.keys()
        for key, tensor in back.tensors.items():
            assert torch.equal(tensor, here.tensors[key]), key
        for layer in back.layers():
            assert back.config.scaling_of(layer.path) == pytest.approx(
                here.config.scaling_of(layer.path), rel=1e-7
            )


@pytest.mark.parametrize("rank", [3, 6, 16])
@pytest.mark.parametrize("format", ["native", "peft", "mlx", "loralib"])
@pytest.mark.thinned
def test_one_rank_and_one_scaling_for_all(format, rank, tmp_path):
    model = tiny("llama")
    config = veneer.LoRA(
        rank=2, alpha=3, targets="all", rank_pattern={"q_proj": 3}, alpha_pattern={"up_proj": 5}
    )
    shake(veneer.attach(model, config))
    veneer.save(model, tmp_path / "adapter")
    done = convert(tmp_path / "adapter", tmp_path / "out", to=format, rank=rank)
    assert "One rank for all layers" in " ".join(done.notes)
    state = formats.read(tmp_path / "out", FormatOptions())
    assert {len(layer.A) for layer in state.layers()} == {rank}
    assert state.config.rank_pattern == state.config.alpha_pattern == {}
    again = veneer.load(tiny("llama"), tmp_path / "out")
    assert_same_logits(logits(again), model, logits)


def test_a_rank_that_is_too_low(tmp_path):
    veneer.save(adapted("plain"), tmp_path / "adapter")
    with pytest.raises(veneer.AdapterError, match="Rank 2 is too low: this adapter's is 3"):
        convert(tmp_path / "adapter", tmp_path / "out", to="peft", rank=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["prefix", "prompt", "full"])
def test_other_methods(method, tmp_path):
    model = shake(veneer.attach(tiny("llama"), veneer.Method(method)))  # type: ignore[arg-type]
    veneer.save(model, tmp_path / "native")
    for to in ("peft", "mlx", "loralib"):
        if to == "peft" and method != "full":
            convert(tmp_path / "native", tmp_path / to, to=to)
            again = veneer.load(tiny("llama"), tmp_path / to)
            assert_same_logits(logits(again), model, logits)
        else:
            with pytest.raises(veneer.AdapterError, match=rf"no (place|format) for {method}"):
                convert(tmp_path / "native", tmp_path / to, to=to)
            assert not (tmp_path / to).exists()


def test_targets_that_only_a_model_could_tell_become_paths(tmp_path):
    """PEFT's patterns, presets and slices mean nothing where they are a list of names."""
    import peft

    for number, options in enumerate(
        (
            {"target_modules": r".*\.1\.self_attn\.[qk]_proj"},
            {"target_modules": "all-linear"},
            {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        )
    ):
        place = tmp_path / str(number)
        torch.manual_seed(7)
        theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, **options)).eval()
        for name, weight in theirs.named_parameters():
            if "lora_" in name:
                weight.data.normal_(std=0.1)
        theirs.save_pretrained(place)
        convert(place, tmp_path / f"{number} again", to="peft")
        written = json.loads((tmp_path / f"{number} again" / "adapter_config.json").read_text())
        assert all(name.startswith("model.layers.") for name in written["target_modules"])
        again = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / f"{number} again")
        assert_same_logits(logits(again.eval()), theirs, logits)


def test_names_are_kept_where_they_will_do():
    state = capture(adapted("plain"))
    assert by_path(state) is state
    assert state.config.targets == ("k_proj", "o_proj", "q_proj", "v_proj")


def test_an_adapter_that_does_not_fit_the_base_named(tmp_path):
    veneer.save(adapted("plain"), tmp_path / "adapter", format="peft")
    with pytest.raises(veneer.AdapterError, match=r"does not fit the base.*no layer"):
        convert(tmp_path / "adapter", tmp_path / "out", to="mlx", base=tiny("gpt2"))
    assert not (tmp_path / "out").exists()


def test_a_base_without_weights_will_do(tmp_path):
    with torch.device("meta"):
        bare = type(tiny("gpt2"))(tiny("gpt2").config)
    veneer.save(adapted("conv1d"), tmp_path / "adapter", format="peft")
    convert(tmp_path / "adapter", tmp_path / "mlx", to="mlx", base=bare, base_name="some/gpt2")
    convert(tmp_path / "mlx", tmp_path / "native", to="native", base=bare)
    again = veneer.load(tiny("gpt2"), tmp_path / "native")
    assert_same_logits(logits(again), adapted("conv1d"), logits)
    config = json.loads((tmp_path / "native" / "lora_config.json").read_text())
    assert config["base"]["name"] == "some/gpt2"


def test_notes_of_what_a_native_adapter_does_not_know(tmp_path):
    veneer.save(adapted("plain"), tmp_path / "native")
    assert convert(tmp_path / "native", tmp_path / "again", to="native").notes == ()
    veneer.save(adapted("plain"), tmp_path / "peft", format="peft")
    (note,) = convert(tmp_path / "peft", tmp_path / "back", to="native").notes
    assert "fingerprint" in note


def files(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in place.iterdir()}


@pytest.mark.parametrize("to", FORMATS)
def test_nothing_is_overwritten_unless_asked(to, tmp_path):
    veneer.save(adapted("plain"), tmp_path / "adapter")
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(veneer.VeneerError, match="holds"):
            convert(tmp_path / "adapter", out, to=to, force=force)
        assert files(out) == {"letter.txt": b"mine"}
    convert(tmp_path / "adapter", tmp_path / "new", to=to)
    before = files(tmp_path / "new")
    with pytest.raises(veneer.VeneerError, match="--force"):
        convert(tmp_path / "adapter", tmp_path / "new", to=to)
    convert(tmp_path / "adapter", tmp_path / "new", to=to, force=True)
    assert files(tmp_path / "new") == before
    if to != "native":  # onto itself
        convert(tmp_path / "new", tmp_path / "new", to=to, force=True)
        again = veneer.load(tiny("llama"), tmp_path / "new")
        assert_same_logits(logits(again), adapted("plain"), logits)


def test_a_file_is_replaced_where_asked(tmp_path):
    veneer.save(adapted("plain"), tmp_path / "adapter")
    out, base = tmp_path / "out.gguf", tiny("llama")
    convert(tmp_path / "adapter", out, to="gguf", base=base)
    before = out.read_bytes()
    with pytest.raises(veneer.VeneerError, match="--force"):
        convert(tmp_path / "adapter", out, to="gguf", base=base)
    convert(tmp_path / "adapter", out, to="gguf", base=base, force=True)
    assert out.read_bytes() == before
    with pytest.raises(veneer.VeneerError, match="holds other things"):
        convert(tmp_path / "adapter", out, to="peft", force=True)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 4.0}, "alpha would do nothing on reading peft"),
        ({"enable_lora": (True, False)}, "enable_lora would do nothing on writing mlx"),
        ({"approximate": True}, "approximate would do nothing on writing mlx"),
    ],
)
def test_what_would_do_nothing_is_refused(options, expected, tmp_path):
    veneer.save(adapted("plain"), tmp_path / "adapter", format="peft")
    with pytest.raises(veneer.AdapterError, match=expected):
        convert(tmp_path / "adapter", tmp_path / "out", to="mlx", **options)
    assert not (tmp_path / "out").exists()


def test_places_without_an_adapter(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("no")
    for name in ("nowhere", "empty", "file.txt"):
        with pytest.raises(veneer.AdapterError, match="adapter"):
            convert(tmp_path / name, tmp_path / "out", to="peft")


def test_the_table_is_complete():
    from typing import get_args

    from veneer.formats.names import FormatName

    assert set(formats.FORMATS) == set(get_args(FormatName))


def test_tensors_that_a_format_does_not_know_are_refused_by_name(tmp_path):
    """What adapters may hold some day is never lost in silence."""
    from dataclasses import replace

    state = capture(adapted("plain"))
    key = "model.layers.0.self_attn.q_proj"
    other = replace(state, tensors=state.tensors | {f"{key}.bias": torch.zeros(32)})
    for format in ("mlx", "loralib"):
        with pytest.raises(veneer.AdapterError, match=rf"{key}\.bias"):
            formats.write(other, tmp_path / format, format, FormatOptions())


def test_a_model_that_takes_no_tokens():
    settings = ConvNextConfig(num_channels=3, hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)
    base = BaseStructure(ConvNextForImageClassification(settings))
    assert base.embedding == ""
    assert "classifier" in base.layers
