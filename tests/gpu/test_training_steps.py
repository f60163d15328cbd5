"""Runs of the training loop on a GPU wait for it once in an evaluation, and in no step."""

import re

import pytest

from gpu.training_cases import CASES, SLOW_CASES

EVENTS = ["Started", "Evaluated", "Step", "Step", "Evaluated", "Checkpointed", "Trained"]
BRIEF = ["Started", "Step", "Checkpointed", "Trained"]
GOING_ON = ["Notice", "Started", "Step", "Evaluated", "Checkpointed", "Trained"]
MATRIX = [name for name in CASES if name.startswith("llama, ")]
# What waits nevertheless, by the kind and the way. Quantized experts are dequantized one by one for
# the rows that each has, and in float16 there is no grouped product, which notices say. A prefix
# before windows asks if rows have padding on their left, and the cache for it sends the window's
# length.
WAITS = {
    "falcon": ("modeling_falcon.py",),  # whose own code takes heads by a list of indices
    "nf4": ("lowrank/routing.py",),
    "float16": ("lowrank/routing.py",),
    "prefix, padded": ("adapter/virtual_forward.py", "cache_utils.py"),
}
# What waits in transformers' own code for models which fewer people tune: all of it, so that one
# more fails, and one less. docs/gpu.md names the models.
SENDS, READS = "aten::_to_copy to the card in", "aten::_local_scalar_dense in"
QWEN4_EXP = {"aten::nonzero in models/qwen4_exp/modeling_qwen4_exp.py forward"}
OWN_WAITS = {
    "cpmant": {f"{SENDS} models/cpmant/modeling_cpmant.py _prepare_attention_mask"},
    "gemma3n_text": {f"{SENDS} models/gemma3n/modeling_gemma3n.py _gaussian_topk"},
    "gpt-sw3": {
        f"{SENDS} modeling_utils.py warn_if_padding_and_no_attention_mask",
        f"{READS} modeling_utils.py warn_if_padding_and_no_attention_mask",
    },
    "gpt_neo": {f"{SENDS} models/gpt_neo/modeling_gpt_neo.py _attn"},
    "longcat_flash": {
        "aten::nonzero in models/longcat_flash/modeling_longcat_flash.py forward",
        f"{READS} models/longcat_flash/modeling_longcat_flash.py forward",
    },
    "phimoe": {f"{SENDS} models/phimoe/modeling_phimoe.py forward"},
    "qwen4_exp": QWEN4_EXP,
    "qwen4_exp_text": QWEN4_EXP,
    "xlm": {f"{READS} models/xlm/modeling_xlm.py forward"},
    "xmod": {
        "aten::index.Tensor by a mask in models/xmod/modeling_xmod.py lang_adapter",
        "aten::index_put_ by a mask in models/xmod/modeling_xmod.py lang_adapter",
        "aten::index.Tensor by a mask in other code",  # the backward pass of the second
    },
}


def check(case: str, result: dict) -> None:
    known = [place for kind, places in WAITS.items() if kind in case for place in places]
    own = OWN_WAITS.get(case.partition(",")[0], set())

    def unknown(waits: list[str]) -> list[str]:
        """Return what is not known to wait, without the numbers of lines."""
        others = [each for each in waits if not any(place in each for place in known)]
        return [re.sub(r":\d+ ", " ", each) for each in others]

    assert set(unknown(result["in_steps"])) == own
    readings = [each for each in unknown(result["in_evaluations"]) if each not in own]
    assert len(readings) == result["evaluations"]
    assert all("training/evaluate.py" in each for each in readings)
    assert result["devices"] == ["cuda:0"]
    assert result["of_another_dtype"] == []


@pytest.mark.parametrize("case", MATRIX)
def test_no_step_waits(case, pretend):
    result = pretend("training_cases", case)
    check(case, result)
    is_brief = case != "llama, lora, packed"
    assert result["events"] == (BRIEF if is_brief else EVENTS + GOING_ON)


def test_no_pass_of_several_adapters_waits(pretend):
    result = pretend("training_cases", "together")
    assert result == {"alone": {}, "in_passes": [], "left_out": []}


def test_one_reading_more_is_seen(pretend):
    (place,) = pretend("training_cases", "a reading in a step")["in_steps"]
    assert "_local_scalar_dense" in place


def test_a_weight_of_another_dtype_is_seen(pretend):
    widened = pretend("training_cases", "widened weights")["of_another_dtype"]
    assert widened
    assert all(each.startswith("torch.float32") for each in widened)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES)
def test_no_step_of_any_model_waits(case, pretend):
    result = pretend("training_cases", case, "SLOW_CASES")
    check(case, result)
    assert result["events"] == EVENTS
