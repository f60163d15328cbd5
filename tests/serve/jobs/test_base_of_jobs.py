"""A job trains over the weights that are served, whatever the files and the flags are."""

import pytest
import torch

import veneer
from support.published_bases import published
from support.random_adapters import tokenizer
from support.tiny_gguf import random_model, write_model
from support.tiny_models import tiny
from veneer.formats.merged import write_model as write_dense
from veneer.quant.stack import quantized_weights
from veneer.serve.run import bits_of_jobs


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    place = tmp_path_factory.mktemp("bases")
    write_dense(tiny("llama"), tokenizer(), place / "dense")
    write_model("llama", random_model("llama"), place / "blocks.gguf", kind="Q8_0")
    write_model("llama", random_model("llama"), place / "plain.gguf")
    fp8, _ = published("qwen2", "fp8")
    return {"dense": place / "dense", "fp8": fp8} | {
        name: place / f"{name}.gguf" for name in ("blocks", "plain")
    }


@pytest.mark.parametrize(
    ("name", "bits", "expected"),
    [
        ("dense", None, None),
        ("dense", 16, None),
        ("dense", 4, 4),
        ("plain", None, None),
        ("plain", 8, 8),
        ("blocks", None, None),
        ("blocks", 16, 16),
        ("blocks", 4, 4),
        ("fp8", None, None),
        ("fp8", 16, 16),
        ("fp8", 4, 4),
    ],
)
def test_a_job_loads_the_weights_that_are_served(bases, name, bits, expected):
    served, again = (
        veneer.load_base(bases[name], bits=each, dtype="float32", tokenizer=tokenizer())
        for each in (bits, expected)
    )
    assert bits_of_jobs(served) == expected
    kinds = [
        {path: (weight.kind, weight.bits) for path, weight in quantized_weights(base.model).items()}
        for base in (served, again)
    ]
    assert kinds[0] == kinds[1]
    ids = torch.tensor([[1, 5, 7]])
    assert torch.equal(served.model(ids).logits, again.model(ids).logits)
