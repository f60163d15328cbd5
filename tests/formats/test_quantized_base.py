"""Quantized bases on disk: what we write, bitsandbytes reads, and the other way round."""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import veneer
from support.random_adapters import distance, ids, logits, shake, tokenizer
from support.tiny_models import quantized, tiny
from veneer.cli.app import run
from veneer.formats.merged import write_model
from veneer.formats.quantized import write_quantized
from veneer.models.fingerprint import fingerprint
from veneer.models.load import load_base, open_base
from veneer.quant.nf4 import NF4
from veneer.quant.weight import quantized_layers

DTYPE = {"dtype": "float32"}


def values(model: Any) -> dict[str, torch.Tensor]:
    return {path: layer.weight for path, layer in quantized_layers(model).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() != set() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A saved Llama whose rows are longer than a block, which bitsandbytes' kernel needs."""
    home = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    write_model(LlamaForCausalLM(config).to(torch.bfloat16), tokenizer(), home / "dense")
    assert run(["quantize", str(home / "dense"), str(home / "q4")]) == 0
    assert run(["quantize", str(home / "dense"), str(home / "q8"), "--bits", "8"]) == 0
    return home


def theirs(place: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16, **options).eval()


def test_transformers_and_bitsandbytes_read_it(real):
    ours = load_base(real / "q4", dtype="bf16").model
    model = theirs(real / "q4")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert type(model.lm_head) is torch.nn.Linear
    assert distance(logits(model).float(), logits(ours).float()) < 0.01
    eight = theirs(real / "q8")
    assert type(eight.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    ours = load_base(real / "q8", dtype="bf16").model
    # They round what is multiplied to 8 bits too.
    assert distance(logits(eight).float(), logits(ours).float()) < 0.05


@pytest.mark.parametrize("bits", [4, 8])
def test_what_bitsandbytes_quantizes_we_read(real, bits, tmp_path):
    how: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        how = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        }
    model = theirs(real / "dense", quantization_config=BitsAndBytesConfig(**how))
    model.save_pretrained(tmp_path / "hub")
    tokenizer().save_pretrained(tmp_path / "hub")
    ours = load_base(tmp_path / "hub", **DTYPE).model
    assert len(quantized_layers(ours)) == 14
    assert equal(values(ours), values(load_base(real / "dense", bits=bits, **DTYPE).model))
    # Nothing but the codes tells this base from others.
    other = load_base(real / "q4", **DTYPE).model
    assert fingerprint(ours) != fingerprint(other)
    veneer.save(veneer.attach(ours, veneer.LoRA(rank=2)), tmp_path / "a")
    veneer.load(load_base(tmp_path / "hub", **DTYPE).model, tmp_path / "a")
    with pytest.raises(veneer.AdapterError, match="another base"):
        veneer.load(other, tmp_path / "a")


def test_law_5_peft_over_bitsandbytes_gives_our_logits(real, tmp_path):
    base = load_base(real / "q4", dtype="bf16")
    model = shake(veneer.attach(base.model, veneer.LoRA(rank=4, targets="all")))
    veneer.save(model, tmp_path / "a", format="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_of_theirs = peft.PeftModel.from_pretrained(theirs(real / "q4"), tmp_path / "a").eval()
    ours_logits = logits(model).float()
    assert distance(logits(model_of_theirs).float(), ours_logits) < 0.02
    assert (
        distance(logits(theirs(real / "q4")).float(), ours_logits) > 0.1
    )  # what the adapter changes


def test_the_base_stays_in_its_file(real):
    model = load_base(real / "q4", **DTYPE).model
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("/proc is not here")
    spans = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in maps.read_text().splitlines()
        if line.endswith(".safetensors")
    ]
    for path, layer in quantized_layers(model).items():
        at = layer.quantized_weight.codes.data_ptr()
        assert any(first <= at < last for first, last in spans), path


def test_reading_ahead_is_set_up_by_blocks(real):
    model = load_base(real / "q4", **DTYPE).model
    hooks = {p: layer.quantized_weight.before_use for p, layer in quantized_layers(model).items()}
    assert len({id(hook.func.__self__) for hook in hooks.values()}) == 1
    for path, hook in hooks.items():
        assert f".{hook.args[0]}." in path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "cannot be read as a quantized model"),
        ("missing", "lacks 1 weights: model.norm.weight"),
        ("method", "quantized by hqq"),
        ("report", "veneer.json cannot be read"),
        ("shape", r"up_proj\.weight is \(128, 192\), but this model's is \(192, 128\)"),
        ("scales", r"up_proj\.weight cannot be read as a quantized weight"),
        ("index", "cannot be read as a list of files"),
    ],
)
def test_a_damaged_base(real, damage, message, tmp_path, capsys):
    place = tmp_path / "q"
    place.mkdir()
    for file in (real / "q4").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    (shard,) = place.glob("*.safetensors")
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "missing":
        shard.write_bytes(
            shard.read_bytes().replace(b'"model.norm.weight"', b'"model.nurm.weight"')
        )
    elif damage == "index":
        (place / "model.safetensors.index.json").write_text("[]")
    elif damage in ("shape", "scales"):
        tensors = load_file(shard)
        path = "model.layers.0.mlp.up_proj.weight"
        if damage == "shape":
            other = NF4.quantize(torch.randn(128, 192), torch.bfloat16).tensors()
            tensors |= {f"{path.removesuffix('weight')}{name}": t for name, t in other.items()}
        else:
            del tensors[f"{path}.absmax"]
        save_file(tensors, shard, metadata={"format": "pt"})
    elif damage == "report":
        (place / "veneer.json").write_text("{")
    else:
        config = json.loads((place / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "hqq", "bits": 4}
        (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(veneer.ModelError, match=message):
        load_base(place)
    assert run(["generate", str(place), "x"]) == 2
    assert "Error:" in capsys.readouterr().err


def test_quantizing_twice_is_refused(real, capsys, tmp_path):
    with pytest.raises(veneer.ModelError, match="quantized already"):
        load_base(real / "q4", bits=4)
    assert run(["quantize", str(real / "q4"), str(tmp_path / "x")]) == 2
    assert "quantized already" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_on_the_fly_as_from_the_disk(real, bits):
    fly = load_base(real / "dense", bits=bits, dtype="bf16").model
    disk = load_base(real / f"q{bits}", dtype="bf16").model
    assert torch.equal(logits(fly, ids()), logits(disk, ids()))
    assert fingerprint(fly) == fingerprint(disk) == fingerprint(load_base(real / "dense").model)


def test_how_a_base_generates_is_kept(real, tmp_path):
    home = tmp_path / "dense"
    shutil.copytree(real / "dense", home)
    report = {"eos_token_id": [2, 7], "temperature": 0.3, "do_sample": True}
    (home / "generation_config.json").write_text(json.dumps(report))
    assert run(["quantize", str(home), str(tmp_path / "q")]) == 0
    for place, options in ((home, {"bits": 4}), (tmp_path / "q", {}), (home, {})):
        config = load_base(place, **options).model.generation_config
        assert config.eos_token_id == [2, 7], place
        assert config.temperature == 0.3


def test_files_that_lie_beside_a_model_are_not_read(real, tmp_path):
    home = tmp_path / "dense"
    shutil.copytree(real / "dense", home)
    tensors = load_file(home / "model.safetensors")
    save_file({name: 2 * t for name, t in tensors.items()}, home / "model.zfp16.safetensors")
    loaded = load_base(home, bits=4, **DTYPE).model
    assert equal(values(loaded), values(load_base(real / "dense", bits=4, **DTYPE).model))


def test_weights_that_only_the_configuration_ties(tmp_path):
    model, tokens = tiny("llama"), tokenizer()
    write_model(model, tokens, tmp_path / "tied")
    file = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert load_base(tmp_path / "tied", bits=4, **DTYPE).notices == ()
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    base = load_base(tmp_path / "tied", bits=4, **DTYPE)
    assert "in memory at once" in base.notices[0]
    head = base.model.get_output_embeddings().weight
    assert torch.equal(head, load_base(tmp_path / "tied", **DTYPE).model.lm_head.weight)


def test_a_quantized_model_is_not_written_as_a_plain_one(tmp_path):
    with pytest.raises(veneer.ModelError, match="merge"):
        write_model(quantized("llama"), tokenizer(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_settings_of_quantizing_that_cannot_be(real):
    with pytest.raises(veneer.ConfigError, match="must be 4, 8 or 16"):
        load_base(real / "dense", bits=3)
    with pytest.raises(veneer.ConfigError, match="without bits"):
        load_base(real / "dense", pack_head=True)


def test_bytes_that_were_stored_as_wider_numbers(real, tmp_path):
    place = tmp_path / "q"
    shutil.copytree(real / "q4", place)
    (shard,) = place.glob("*.safetensors")
    tensors = load_file(shard)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.uint8 and name.endswith("proj.weight"):
            tensors[name] = tensor.view(-1).view(torch.bfloat16).view(-1, 1)
    save_file(tensors, shard, metadata={"format": "pt"})
    loaded = values(load_base(place, **DTYPE).model)
    assert equal(loaded, values(load_base(real / "q4", **DTYPE).model))


def test_other_files_are_read_whole_with_a_notice(real, tmp_path):
    home = tmp_path / "bin"
    model = LlamaForCausalLM.from_pretrained(real / "dense", dtype=torch.bfloat16)
    home.mkdir()
    torch.save(model.state_dict(), home / "pytorch_model.bin")
    model.config.save_pretrained(home)
    tokenizer().save_pretrained(home)
    base = load_base(home, bits=4, dtype="bf16")
    assert "in memory at once" in base.notices[0]
    disk = load_base(real / "q4", dtype="bf16").model
    assert torch.equal(logits(base.model), logits(disk))


def test_modes_follow_the_umask(real):
    mask = os.umask(0)
    os.umask(mask)
    for file in (real / "q4").glob("model*"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_base_that_has_changed_meanwhile_is_quantized_anew(real, tmp_path):
    home, out = tmp_path / "dense", tmp_path / "q"
    shutil.copytree(real / "dense", home)

    def start() -> Any:
        weights, tokens, _ = open_base(home)
        return write_quantized(weights, tokens, out, bits=4, name="x", shard_bytes=60000)

    shards = start()
    first = [next(shards), next(shards)]
    shards.close()
    tensors = load_file(home / "model.safetensors")
    # Not the first weight of any file, and not where the fingerprint looks.
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] += 1
    save_file(tensors, home / "model.safetensors", metadata={"format": "pt"})
    assert not any(shard.kept for shard in list(start())[: len(first)])
