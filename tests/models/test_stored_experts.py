"""Mixtures whose experts are quantized one by one, in memory and in files."""

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from veneer.adapter.attach import attach
from veneer.adapter.config import LoRA
from veneer.adapter.merge import merge
from veneer.adapter.new_tokens import add_tokens
from veneer.errors import ConfigError, ModelError
from veneer.formats.quantized import write_quantized
from veneer.models import minigpt
from veneer.models.description import describe
from veneer.models.fingerprint import fingerprint
from veneer.models.load import load_base, load_skeleton, open_base
from veneer.models.quantize import quantizable_embedding
from veneer.models.stored_names import stored_names
from veneer.quant.embedding import QuantizedEmbedding
from veneer.quant.joined import JoinedRows
from veneer.quant.stack import quantized_stacks

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
}
TIED = {"tie_word_embeddings": True}
# Gate and up apart in the files; the same under other names; stacks in the files, transposed.
CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=64),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=4, layer_types=["full_attention"] * 2),
}
NAMES = {
    "qwen3_moe": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w1.weight",
    "gpt_oss": "model.layers.1.mlp.experts.3.gate_up_proj.weight",
}


@pytest.fixture(scope="module", params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def home(kind, tmp_path_factory):
    """A directory as transformers writes it."""
    directory = tmp_path_factory.mktemp(kind)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.bfloat16)
    model.save_pretrained(directory)
    trained = minigpt.train_tokenizer(["a thin layer over a solid board"], vocab_size=300)
    minigpt.wrap_tokenizer(trained).save_pretrained(directory)
    return directory


def quantized(home, out, bits):
    source, tokenizer, notices = open_base(home)
    assert not notices  # its files were read weight by weight
    return list(write_quantized(source, tokenizer, out, bits=bits, name="x"))


def test_experts_are_read_one_by_one_from_files_that_have_them_apart(home):
    source, _, _ = open_base(home)
    model = load_base(home, dtype="bfloat16").model
    for name, weight in model.state_dict().items():
        assert torch.equal(source.read(name), weight)
        if weight.ndim == 3:
            assert all(torch.equal(source.expert(name, e), weight[e]) for e in range(4))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_stored_stack_computes_what_one_in_memory_does(home, kind, bits, tmp_path):
    (shard,) = quantized(home, tmp_path / "out", bits)
    assert sum(layer.experts == 4 for layer in shard.layers) == 4
    with safe_open(tmp_path / "out" / "model-00001-of-00001.safetensors", "pt") as file:
        assert NAMES[kind] in file.keys()  # noqa: SIM118
    stored = load_base(tmp_path / "out", dtype="bfloat16").model
    memory = load_base(home, dtype="bfloat16", bits=bits).model
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(stored(ids).logits, memory(ids).logits)
    assert len(quantized_stacks(stored)) == 4
    assert fingerprint(stored) == fingerprint(memory)
    assert fingerprint(stored) == fingerprint(load_base(home, dtype="bfloat16").model)


def test_the_codes_of_each_expert_are_bitsandbytes_own(home):
    dense = load_base(home, dtype="bfloat16").model.state_dict()
    for path, stack in quantized_stacks(load_base(home, dtype="bfloat16", bits=4).model).items():
        for e in range(4):
            weight = dense[path][e].T if stack.transposed else dense[path][e]
            expert, first = stack.expert(e), 0
            for piece in expert.pieces if isinstance(expert, JoinedRows) else [expert]:
                rows = weight[first : first + piece.shape[0]].contiguous()
                codes, state = bnb.quantize_4bit(rows, quant_type="nf4", compress_statistics=True)
                assert torch.equal(piece.codes, codes)
                assert torch.equal(piece.state.absmax, state.absmax)
                assert torch.equal(piece.state.offset, state.offset)
                assert torch.equal(
                    piece.dequantize(),
                    bnb.dequantize_4bit(codes, state),
                )
                first += len(rows)
            # As one weight, an expert has the same codes.
            whole, _ = bnb.quantize_4bit(weight.contiguous(), quant_type="nf4")
            pieces = expert.pieces if isinstance(expert, JoinedRows) else [expert]
            assert torch.equal(torch.cat([piece.codes for piece in pieces]), whole)


def test_an_embedding_in_8_bits_is_dequantized_row_by_row(home, tmp_path):
    source, tokenizer, _ = open_base(home)
    options = {"bits": 4, "name": "x", "pack_head": True, "pack_embedding": True}
    list(write_quantized(source, tokenizer, tmp_path / "out", **options))
    model = load_base(tmp_path / "out", dtype="bfloat16").model
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    weight = source.read("model.embed_tokens.weight")
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    assert torch.equal(embedding.quantized_weight.codes, codes)
    assert torch.equal(embedding.quantized_weight.absmax, scales)
    ids = torch.tensor([[3, 299, 3], [0, 7, 41]])
    assert torch.equal(embedding(ids), embedding.weight[ids])
    assert describe(model).parameters == describe(source.skeleton).parameters
    assert fingerprint(model) == fingerprint(load_base(home, dtype="bfloat16").model)
    attach(model, LoRA(rank=2, targets="all"), seed=0)
    plain = merge(model)
    assert torch.equal(plain.get_input_embeddings().weight, embedding.weight)
    with pytest.raises(ModelError, match="not quantized"):
        add_tokens(load_base(tmp_path / "out").model, tokenizer, ["plywood"])


def test_an_embedding_that_is_the_head_stays_dense(tmp_path):
    with pytest.raises(ConfigError, match="head too"):
        quantizable_embedding(AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, **TIED)))


def test_a_missing_expert_is_named(home, kind, tmp_path):
    quantized(home, tmp_path / "out", 4)
    file = tmp_path / "out" / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    del tensors[NAMES[kind]]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=NAMES[kind]):
        load_base(tmp_path / "out")


def test_names_in_files_are_known_without_a_weight(home, kind):
    names = stored_names(load_skeleton(home))
    assert {pieces[0].name for pieces in names.pieces(_stack(kind))} == {
        NAMES[kind].replace(".3.", f".{e}.") for e in range(4)
    }


def _stack(kind):
    return "model.layers.1.mlp.experts.gate_up_proj"
