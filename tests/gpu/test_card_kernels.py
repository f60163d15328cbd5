"""Kernels of a card on the pretend GPU: nothing waits for it, and shapes are right."""

import pytest

from gpu import kernels_cases


@pytest.mark.parametrize("case", kernels_cases.CASES)
def test_nothing_waits_for_the_card(case, pretend):
    assert pretend("kernels_cases", case)["waits"] == []


@pytest.mark.parametrize("case", [name for name in kernels_cases.CASES if "attention" in name])
def test_attention_pads_heads_and_takes_the_padding_off(case, pretend):
    result = pretend("kernels_cases", case)
    assert result["shapes"] == [[38, 4, 20], [38, 4, 24], [38, 2, 24], [38, 2, 20]]
    assert result["dtypes"] == ["torch.bfloat16"]


@pytest.mark.parametrize("case", [name for name in kernels_cases.CASES if "experts" in name])
def test_experts_have_gradients_of_their_factors_shapes(case, pretend):
    result = pretend("kernels_cases", case)
    assert result["y"] == [20, 48]
    assert all(result["as leaves"])


def test_few_tokens_are_multiplied_with_the_codes(pretend):
    few, many = (pretend("kernels_cases", f"nf4, {n} tokens") for n in ("few", "many"))
    assert (few["by codes"], few["dx"]) == (True, [4, 64])
    assert (many["by codes"], many["dx"]) == (False, [600, 64])
