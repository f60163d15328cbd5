"""What an adapter knows of its training, in every format: what its base was computed in, and the
system prompt."""

import json
import warnings

import peft
import pytest
from transformers import AutoModelForCausalLM

import veneer
from support.closeness import assert_same_logits
from support.random_adapters import logits, shake
from support.tiny_models import quantized, tiny
from veneer.errors import AdapterError
from veneer.formats.adapters import read
from veneer.formats.capture import capture
from veneer.formats.card import card
from veneer.formats.convert import convert
from veneer.formats.locate import locate
from veneer.formats.table import FORMATS
from veneer.formats.training import FILE, base_in, computed_in, other_base, system_prompt

SYSTEM = "Answer as a pirate: „arr“.\nAlways."


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A native adapter trained over 4 bits, with a system prompt."""
    model = shake(veneer.attach(quantized("llama"), veneer.LoRA(rank=2, targets=["q_proj"])))
    place = tmp_path_factory.mktemp("adapter") / "native"
    veneer.save(model, place, training={"data": "0123", "system": SYSTEM})
    return place


@pytest.mark.parametrize("to", ["native", "peft", "mlx", "loralib", "gguf"])
def test_every_format_keeps_it_and_says_it_without_its_tensors(adapter, to, tmp_path):
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    convert(adapter, out, to=to, base=tiny("llama"))
    facts = {"base": {"bits": 4, "kind": "nf4", "dtype": "float32"}, "data": "0123"}
    facts["system"] = SYSTEM
    assert read(out, tiny("llama")).training == facts
    for weights in [] if to == "gguf" else out.glob("*weights*"):
        weights.write_bytes(b"")
    assert locate(out).training == facts
    base = base_in(facts)
    assert (base.bits, base.kind, str(base)) == (4, "nf4", "4 bits (nf4)")
    assert system_prompt(facts) == SYSTEM


@pytest.mark.parametrize("to", ["peft", "mlx", "gguf"])
def test_a_built_in_base_has_the_hubs_name_in_files_for_others_and_its_own_here(to, tmp_path):
    own, hub = "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets=["q_proj"]))
    model.config._name_or_path = own
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    assert hub in veneer.save(model, out, format=to)[-1]
    assert FORMATS[to].base(out) == hub
    assert locate(out).base == own
    state = read(out, tiny("llama"))
    assert (state.base_name, set(state.training)) == (own, {"base"})
    if to == "peft":
        assert f"base_model: {hub}\n" in (out / "README.md").read_text(encoding="utf-8")
        (out / FILE).unlink()
        assert locate(out).base == hub  # it may be anyone's, over the hub's own weights


def test_peft_loads_it_without_a_warning_and_its_card_says_it(adapter, tmp_path):
    home = tmp_path / "base"
    tiny("llama").save_pretrained(home)
    convert(adapter, tmp_path / "out", to="peft")
    assert {FILE, "adapter_config.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    model = AutoModelForCausalLM.from_pretrained(home).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*(unexpected|ignored|missing|not found)")
        theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "out"))
    with pytest.warns(veneer.VeneerWarning, match="trained over its base in 4 bits"):
        ours = veneer.load(tiny("llama"), tmp_path / "out")
    assert_same_logits(logits(theirs), ours, logits)
    text = card(read(tmp_path / "out"))
    assert "computed in 4 bits (nf4)." in text
    assert "    Answer as a pirate: „arr“.\n    Always." in text


def test_what_was_trained_here_was_trained_over_this_base_and_what_was_loaded_was_not(tmp_path):
    models = {bits: quantized("qwen2", bits, head=True) for bits in (4, 8)}
    veneer.attach(models[4], veneer.LoRA(rank=2))
    then = computed_in(models[4])
    assert str(then) == "4 bits (nf4, the head too)"
    assert base_in(capture(models[4]).training) == then
    veneer.save(models[4], tmp_path)
    with pytest.warns(veneer.VeneerWarning) as caught:
        veneer.load(models[8], tmp_path)
    assert [str(each.message) for each in caught] == [
        f"The adapter in {tmp_path} was trained over its base in 4 bits (nf4, the head too), and "
        "here the base is in 8 bits (int8, the head too): its answers may differ from those that "
        "it was trained to give. --bits auto (in Python, load_base with bits=4, pack_head=True) "
        "loads the base as it was."
    ]
    assert base_in(capture(models[8]).training) == then
    for weight in models[8].parameters():
        weight.requires_grad_(weight.is_floating_point())
    assert base_in(capture(models[8]).training).bits == 8


def test_nothing_is_said_of_the_same_bits_and_of_old_files(tmp_path):
    dense = computed_in(tiny("llama"))
    assert str(dense) == "32 bits (float32)"
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2))
    veneer.save(model, tmp_path)
    same = locate(tmp_path).training
    assert other_base("It", same, dense) is None
    assert "with no bits" in other_base("It", same, computed_in(quantized("llama")))
    config = json.loads((tmp_path / "lora_config.json").read_text())
    del config["training"]
    (tmp_path / "lora_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error", veneer.VeneerWarning)
        veneer.load(quantized("llama"), tmp_path)
    assert read(tmp_path).training == locate(tmp_path).training == {}


@pytest.mark.parametrize(
    "base", [None, 4, [], {"bits": 4}, {"dtype": "bfloat16", "bits": 5}, {"dtype": [], "bits": 4}]
)
def test_what_no_adapter_can_know_counts_as_not_known(base):
    assert base_in({"base": base}) is None
    assert system_prompt({"system": base}) is system_prompt({"system": " "}) is None


def test_a_file_that_is_no_map_is_refused(adapter, tmp_path):
    convert(adapter, tmp_path / "out", to="peft")
    (tmp_path / "out" / FILE).write_text("[]")
    with pytest.raises(AdapterError, match=FILE):
        read(tmp_path / "out")


def test_a_combination_knows_what_its_adapters_agree_on(adapter):
    four = read(adapter)
    assert veneer.combine([four, four], [0.5, 0.5]).state.training == {
        name: four.training[name] for name in ("base", "system")
    }
    model = shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets=["q_proj"])))
    combined = veneer.combine([four, capture(model)], [0.5, 0.5])
    assert combined.state.training == {}
    over = "They were trained over their base in 4 bits (nf4) and 32 bits (float32)."
    assert over in combined.notices
