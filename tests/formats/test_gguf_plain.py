"""Plain transformers models as GGUF files: llama.cpp gives our ids and our log probabilities."""

import copy
import json
import random
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import veneer
from support.llama_cpp import LlamaCpp
from support.random_adapters import distance, ids, logits, shake
from support.tiny_gguf import CONFIGS
from veneer.cli.app import run
from veneer.data.chat import prompt_text
from veneer.data.rows import Message
from veneer.errors import ModelError
from veneer.formats.gguf.plain import SCRIPT, VARIABLE, WRITTEN, write_plain
from veneer.formats.gguf.vocabulary import PRE_TOKENIZERS
from veneer.formats.merged import write_model
from veneer.models.gguf import load_tokenizer

HALF = 2 * torch.finfo(torch.float16).eps  # llama.cpp has tables of half precision
SIZE = 600
ROWS = SIZE + 8  # of the embedding: more than tokens
# Pieces at whose borders the ways to split text differ.
PIECES = [
    *("the", "Dog", "it's", "IT'S", "we'Ll", "'d", "x's3", "déjà", "ñandú", "Ελλ", "привет"),
    *("3", "33", "1234567", "3.14", "²", "٣٤", "我想在", "ですか", "เด็ก", "🦙", "👩‍👩‍👧", "\u200d"),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000"),
    *(".", "...", "!?", '"', "''", "(", "_", "--", "€", "<", "|>", "~", "</s>", "<mine>"),
]


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(PIECES, k=draw.randint(1, 12))) for _ in range(count)]


@pytest.fixture(autouse=True)
def no_converter(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@cache
def bpe(pre: str) -> str:
    """Return a tokenizer that splits so. Its merges know no borders, so that every split shows."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 1, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    plain.train_from_iterator(texts(400, seed=1), trainer)
    plain.add_tokens([AddedToken("<mine>", normalized=False)])
    plain.decoder = decoders.ByteLevel()
    steps, ignore_merges = PRE_TOKENIZERS[pre]
    described = json.loads(plain.to_str())
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": copy.deepcopy(steps)}
    for step in described["pre_tokenizer"]["pretokenizers"]:
        if step["type"] == "ByteLevel":
            step["trim_offsets"] = True
    described["model"]["ignore_merges"] = ignore_merges
    return json.dumps(described)


def tokenizer(pre: str, *, bos: bool = False) -> PreTrainedTokenizerFast:
    plain = Tokenizer.from_str(bpe(pre))
    if bos:
        plain.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


def directory(config, tokens: PreTrainedTokenizerFast, path: Path):
    """Write a random model with these tokens; return it."""
    config = copy.deepcopy(config)
    config.vocab_size = ROWS
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = [1, 2]
    for name, weight in model.named_parameters():
        with torch.no_grad():
            weight.normal_(mean=float("norm" in name), std=0.15)
    write_model(model, tokens, path)
    return model


def assert_same_ids(server: LlamaCpp, tokens, strings: Iterable[str]) -> None:
    for text in strings:
        asked = {"content": text, "add_special": True}
        assert server.ask("/tokenize", asked)["tokens"] == tokens(text)["input_ids"], repr(text)


SHAPE = CONFIGS["llama"][1].to_dict()
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "llama, tied": (CONFIGS["llama, tied"][1], "smollm"),
    "llama 3": (LlamaConfig(**SHAPE | {"rope_parameters": ROPE}), "llama-bpe"),
    "mistral": (CONFIGS["mistral"][1], "gpt-2"),
    "qwen2": (CONFIGS["qwen2"][1], "qwen2"),
    "qwen3": (CONFIGS["qwen3"][1], "qwen2"),
    "smollm3": (CONFIGS["smollm3"][1], "llama-bpe"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.thinned(one_in=2)
def test_llama_cpp_gives_our_ids_and_probabilities(name, tmp_path):
    config, pre = CASES[name]
    tokens = tokenizer(pre, bos=name == "llama 3")
    model = directory(config, tokens, tmp_path / "model")
    notes = write_plain(tmp_path / "model", tmp_path / "model.gguf")
    # transformers reads a Qwen2 model's tokenizer as one that composes characters.
    assert ["compose" in note for note in notes] == [True] * (name == "qwen2")
    server = LlamaCpp(tmp_path / "model.gguf", exact=True)
    asked = ids(12, 40, vocabulary=ROWS)
    expected = logits(model, asked)[:, -1].log_softmax(-1)
    # Of a token that is half a character, the server says no probabilities.
    whole = ["\ufffd" not in tokens.decode(token) for token in expected.argmax(-1)]
    asked, expected = asked[whole][:3], expected[whole][:3]
    assert len(asked) > 1
    assert distance(server.next_token(asked, ROWS), expected) < HALF
    assert_same_ids(server, tokens, texts(200, seed=2))


def test_every_architecture_and_splitting_is_tried():
    assert {config.model_type for config, _ in CASES.values()} == {*WRITTEN}
    assert {pre for _, pre in CASES.values()} == {*PRE_TOKENIZERS}


@pytest.fixture
def qwen(tmp_path):
    directory(CONFIGS["qwen3"][1], tokenizer("qwen2"), tmp_path / "model")
    return tmp_path / "model"


def test_matrices_are_stored_as_asked(qwen, tmp_path, capsys):
    for kind in (None, "f16", "BF16", "q8_0"):
        file = tmp_path / f"{kind}.gguf"
        flags = [] if kind is None else ["--gguf-type", kind]
        assert run(["convert", str(qwen), str(file), "--to", "gguf", *flags]) == 0
        assert "Saved" in capsys.readouterr().out
        tensors = gguf.GGUFReader(file).tensors
        kinds = {(t.name.endswith("norm.weight"), t.tensor_type.name) for t in tensors}
        assert kinds == {(True, "F32"), (False, (kind or "f32").upper())}
    back = veneer.load_base(tmp_path / "None.gguf", dtype="float32").model.state_dict()
    weights = veneer.load_base(qwen, dtype="float32").model.state_dict()
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())


def test_what_the_file_says_beside_the_weights(qwen, tmp_path):
    write_plain(qwen, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    values = {name: field.contents() for name, field in fields.items()}
    assert values["tokenizer.chat_template"].startswith("{% for m in messages %}")
    special = [values[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot")]
    assert special == [0, 1, 2]  # the model's settings end generation with 2 too
    types = values["tokenizer.ggml.token_type"]
    kinds = gguf.TokenType
    expected = [kinds.CONTROL, kinds.USER_DEFINED, kinds.UNUSED]
    mine = tokenizer("qwen2").convert_tokens_to_ids("<mine>")
    assert [types[0], types[mine], types[ROWS - 1]] == expected


def test_the_tokenizer_comes_back_with_the_file_s_tokens_alone(qwen, tmp_path):
    write_plain(qwen, tmp_path / "model.gguf")
    again, own = load_tokenizer(tmp_path / "model.gguf"), tokenizer("qwen2")
    assert "<|endoftext|>" not in again.get_vocab()  # which transformers adds behind the last row
    assert len(again) == ROWS
    text = "the Dog says <|endoftext|> <mine>"
    assert again(text).input_ids == own(text).input_ids


def test_merge_takes_any_base_into_gguf(qwen, tmp_path, capsys):
    model = veneer.load_base(qwen, dtype="float32").model
    shake(veneer.attach(model, veneer.LoRA(rank=2, targets="all")), size=0.05)
    veneer.save(model, tmp_path / "adapter")
    out = tmp_path / "merged.gguf"
    arguments = ["merge", str(qwen), str(tmp_path / "adapter"), str(out), "--dtype", "float32"]
    assert run(arguments) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"model", "adapter", "merged.gguf"}
    merged = veneer.load_base(out, dtype="float32").model
    plain = veneer.merge(model)
    assert all(torch.equal(w, merged.get_parameter(n)) for n, w in plain.named_parameters())
    assert run(arguments) == 2
    assert "is there already" in capsys.readouterr().err


# Refusals.


def test_what_is_not_proven_is_refused_with_llama_cpp_s_command(qwen, tmp_path):
    settings = json.loads((qwen / "config.json").read_text())
    odd = {"hidden_act": "gelu", "attention_bias": True, "sliding_window": 8}
    odd |= {"use_sliding_window": True, "rope_parameters": {**ROPE, "rope_type": "linear"}}
    (qwen / "config.json").write_text(json.dumps(settings | odd))
    out = tmp_path / "out.gguf"
    with pytest.raises(ModelError) as caught:
        write_plain(qwen, out, kind="f16")
    for setting in ("hidden_act is 'gelu'", "attention_bias", "sliding_window", "rope_type"):
        assert setting in str(caught.value)
    assert f"python {SCRIPT} {qwen} --outfile {out} --outtype f16" in str(caught.value)
    directory(CONFIGS["gpt2"][1], tokenizer("gpt-2"), tmp_path / "gpt2")
    with pytest.raises(ModelError, match="and this is gpt2"):
        write_plain(tmp_path / "gpt2", out)
    with pytest.raises(ModelError, match="not written as 'q4_0', but as f32, f16"):
        write_plain(qwen, out, kind="q4_0")
    assert not out.exists()


def test_a_tokenizer_that_splits_otherwise_is_refused(tmp_path):
    described = json.loads(bpe("qwen2"))
    (split, _) = described["pre_tokenizer"]["pretokenizers"]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"|\p{N}|", r"|\p{N}{1,2}|")
    described["normalizer"] = {"type": "NFKC"}
    described["added_tokens"][0]["rstrip"] = True
    tokens = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)))
    directory(CONFIGS["qwen3"][1], tokens, tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        write_plain(tmp_path / "model", tmp_path / "out.gguf")
    for problem in ("none of the known ways (gpt-2", "(NFKC)", "'<s>' take in the spaces"):
        assert problem in str(caught.value)


def test_flags_of_adapters_beside_a_model_are_refused(qwen, tmp_path, capsys):
    out = str(tmp_path / "out.gguf")
    for flags, says in (
        (["--to", "gguf", "--rank", "4", "--base", "m"], "--base, --rank"),
        (["--to", "peft"], "--to gguf alone"),
    ):
        assert run(["convert", str(qwen), out, *flags]) == 2
        assert says in " ".join(capsys.readouterr().err.split())


# llama.cpp's own converter.


def test_llama_cpp_s_converter_is_called_where_it_is(qwen, tmp_path, monkeypatch):
    script = tmp_path / "llama.cpp" / SCRIPT
    script.parent.mkdir()
    script.write_text(
        "import sys\n"
        "if 'bf16' in sys.argv: sys.exit('no bf16 here')\n"
        "open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write(' '.join(sys.argv))\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    out = tmp_path / "out.gguf"
    assert write_plain(qwen, out) == [f"Converted by llama.cpp's own {script}."]
    assert f"{qwen} --outfile" in out.read_text()
    assert out.read_text().endswith("--outtype auto")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(VARIABLE, str(script.parent))
    write_plain(qwen, out, kind="F16")
    assert out.read_text().endswith("--outtype f16")
    with pytest.raises(ModelError, match="no bf16 here"):
        write_plain(qwen, out, kind="bf16")
    (qwen / "modeling_mine.py").write_text("")
    with pytest.raises(ModelError, match="brings code along"):
        write_plain(qwen, out)
    assert out.read_text().endswith("--outtype f16")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="there is no convert_hf_to_gguf"):
        write_plain(qwen, out)


# The real thing.


def test_a_number_that_float16_cannot_hold_is_no_infinity(tmp_path):
    model = directory(CONFIGS["qwen3"][1], tokenizer("qwen2"), tmp_path / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    write_model(model, tokenizer("qwen2"), tmp_path / "large")
    with pytest.raises(ModelError, match=r"up_proj\.weight has numbers that float16 cannot hold"):
        write_plain(tmp_path / "large", tmp_path / "large.gguf", kind="f16")
    assert not (tmp_path / "large.gguf").exists()
    write_plain(tmp_path / "large", tmp_path / "large.gguf", kind="bf16")


@pytest.mark.slow
def test_smollm2_answers_there_as_here(tmp_path):
    base = veneer.load_base("smollm2-135m", dtype="float32")
    tokens, short = base.tokenizer, veneer.Sampling(max_new_tokens=24)
    write_model(base.model, tokens, tmp_path / "model")
    asked = ["What is the capital of France?", "Name a red fruit.", "Why is the sky blue?"]
    answers = veneer.answers(base.model, tokens, asked, sampling=short)
    prompts = [prompt_text(tokens, [Message("user", question)]) for question in asked]
    for kind in ("f32", "f16"):
        write_plain(tmp_path / "model", tmp_path / f"{kind}.gguf", kind=kind)
        server = LlamaCpp(tmp_path / f"{kind}.gguf", context=512, exact=True)
        got = [server.complete(prompt, n_predict=24)["content"] for prompt in prompts]
        assert got == answers, kind
        chat = {"messages": [{"role": "user", "content": asked[0]}], "temperature": 0}
        reply = server.ask("/v1/chat/completions", chat | {"max_tokens": 24})
        assert reply["choices"][0]["message"]["content"] == answers[0]
    assert_same_ids(server, tokens, [*texts(400, seed=3), *prompts])
