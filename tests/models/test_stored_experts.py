"""Mixtures whose experts are quantized one by one, in memory and in files."""

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

from veneer.formats.quantized import write_quantized
from veneer.models import minigpt
from veneer.models.fingerprint import fingerprint
from veneer.models.load import load_base, load_skeleton, open_base
from veneer.models.stored_names import stored_names
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


def test_a_missing_expert_is_named(home, kind, tmp_path):
    from safetensors.torch import load_file, save_file

    from veneer.errors import ModelError

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
