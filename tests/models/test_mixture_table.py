"""Every mixture of experts among transformers' causal language models is adapted, trained, saved,
loaded and merged, over dense and over 4-bit experts, and docs/models.md says how its experts are
computed.

`PYTHONPATH=tests python tests/models/test_mixture_table.py` writes the table anew.
"""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import veneer
from support.every_architecture import (
    MODEL_TYPES,
    NO_MODEL,
    small,
    small_config,
    small_quantized,
)
from support.random_adapters import distance, examples, ids
from veneer.adapter.parameters import experts_of
from veneer.adapter.targets import describe_base
from veneer.data.packing import pack
from veneer.fused.forward import choose_forward
from veneer.quant.stack import quantized_stacks

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN = "<!-- every mixture of experts: written by its tests, with transformers "
END = "<!-- every mixture of experts ends -->\n"
COLUMNS = "| model type | stacks of experts | experts computed | why not on routed rows |\n"
HEAD = COLUMNS + "|---|---|---|---|\n"
MIXTURES = (
    *("afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe"),
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots1", "dots3_note"),
    *("dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite"),
    *("glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid"),
    *("granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_loop_text"),
    *("inkling2_text", "inkling_text", "jamba", "jetmoe", "kimi_linear", "kolibri1", "laguna"),
    *("lara_mini", "lfm2_moe", "llama4", "llama4_text", "longcat_flash", "mellum"),
    *("mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text", "mixtral", "nemotron_h"),
    *("olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe"),
    *("qwen3_next", "qwen4_exp", "qwen4_exp_text", "sarvam_mla", "sarvam_moe", "solar_open"),
    "zaya",
)
# One of each kind: shared experts, biases, top 1, sigmoid routers, hybrids, latent attention.
QUICK = {
    *("qwen3_moe", "qwen2_moe", "gpt_oss", "llama4_text", "deepseek_v3", "lfm2_moe"),
    *("nemotron_h", "qwen3_next"),
}
QUICK_QUANTIZED = {"qwen3_moe", "gpt_oss", "llama4_text"}
LORA = veneer.LoRA(rank=2, targets="all")
ROWS = examples([7, 19, 12, 5])


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=ids(), use_cache=False).logits


def attached(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", veneer.VeneerWarning)  # of routers
        return veneer.attach(model, LORA, seed=0)


def base_of(model_type: str, bits: int | None) -> Any:
    if bits is None:
        return small(model_type)
    return small_quantized(model_type, 4, dtype=torch.float32)


def prove(model_type: str, bits: int | None) -> Any:
    """Prove that a mixture is adapted, trained, saved, loaded and merged; return it, trained."""
    base = base_of(model_type, bits)
    model = attached(copy.deepcopy(base))
    stacks = [layer.path for layer in describe_base(base).layers if layer.is_stack]
    assert bool(quantized_stacks(base)) == (bits is not None)
    assert torch.equal(logits(model), logits(base))
    train(model, stacks)
    expected = logits(model)
    assert distance(logits(base), expected) > 1e-3
    for format in ("native", "peft"):
        fresh = copy.deepcopy(base)
        with TemporaryDirectory() as place:
            veneer.save(model, f"{place}/adapter", format=format)
            veneer.load(fresh, f"{place}/adapter")
        assert torch.equal(logits(fresh), expected), format
    plain = veneer.merge(model)
    assert not quantized_stacks(plain)
    assert distance(logits(plain), expected) < 1e-3
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(veneer.detach(model)), logits(base))
    return model


def train(model: Any, stacks: list[str]) -> None:
    """Take two steps, and see that adapters alone have gradients, those of each stack too."""
    before = {name: w.clone() for name, w in model.named_parameters() if not w.requires_grad}
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    for path in stacks:
        owner, _, name = path.rpartition(".")
        assert f"{owner}.parts.{name}.adapters.default.lora_B" in trained
    optimizer = torch.optim.Adam(trained.values(), lr=0.03)
    forward, _ = choose_forward(model, ROWS)
    batch = pack(ROWS, range(len(ROWS)))
    model.train()
    for _ in range(2):
        loss = forward(model, batch)
        loss.backward()
        assert loss.isfinite()
        gradients = {name: w.grad for name, w in trained.items() if w.grad is not None}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        optimizer.step()
        optimizer.zero_grad()
    for path in stacks:
        owner, _, name = path.rpartition(".")
        assert trained[f"{owner}.parts.{name}.adapters.default.lora_B"].any(), path
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def line_of(model_type: str) -> str:
    """Return what docs/models.md says of a mixture."""
    model = attached(small(model_type))
    paths = [layer.path.split(".") for layer in describe_base(model).layers if layer.is_stack]
    names = dict.fromkeys(".".join(path[-1 - (path[-1] == "weight") :]) for path in paths)
    reasons = dict.fromkeys(reason for *_, reason in experts_of(model))
    routed = "routed rows" if set(reasons) == {None} else "W + s B A"
    if len(reasons) > 1 and None in reasons:
        routed = "both"
    why = "; ".join(in_words(reason) for reason in reasons if reason)
    return (
        f"| `{model_type}` | {', '.join(names)} | {routed} | {why} |".replace("|  |", "| |") + "\n"
    )


def in_words(reason: str) -> str:
    return re.sub(r"\d[\d.e-]*", "…", reason).rstrip(".").replace("|", "/")


def table() -> tuple[str, list[str]]:
    """Return the version of transformers that the page's table is of, and its lines."""
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    version, *lines = text.splitlines(keepends=True)
    return version.partition(" ")[0], lines[2:]


def page_with(lines: list[str]) -> str:
    """Return docs/models.md with another table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    version = f"{transformers.__version__} -->\n"
    return before + BEGIN + version + HEAD + "".join(lines) + END + rest.partition(END)[2]


def case(model_type: str, bits: int | None) -> Any:
    quick = model_type in (QUICK if bits is None else QUICK_QUANTIZED)
    return pytest.param(model_type, bits, marks=[pytest.mark.slow] * (not quick))


@pytest.mark.parametrize(
    ("model_type", "bits"), [case(t, bits) for t in MIXTURES for bits in (None, 4)]
)
@pytest.mark.thinned(one_in=4, first=2)  # one in 4 bits, and what the table of layers leaves to it
def test_a_mixture_is_adapted(model_type, bits):
    prove(model_type, bits)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MIXTURES)
def test_the_page_says_how_experts_are_computed(model_type):
    version, lines = table()
    if version == transformers.__version__:
        assert line_of(model_type) in lines


@pytest.mark.slow
def test_every_mixture_is_among_them():
    mixtures = []
    for model_type in MODEL_TYPES:
        if model_type not in NO_MODEL:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(small_config(model_type))
            if any(layer.is_stack for layer in describe_base(model).layers):
                mixtures.append(model_type)
    assert mixtures == sorted(MIXTURES)


if __name__ == "__main__":
    PAGE.write_text(page_with(list(map(line_of, MIXTURES))), encoding="utf-8")
