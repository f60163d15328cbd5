"""What a card does of every causal language model of transformers: merge adapters, answer, and take
steps of serving, in which no value is asked of it."""

import re
from pathlib import Path

import pytest

from gpu.zoo_cases import IN_FLOAT16, SLOW_CASES

pytestmark = pytest.mark.slow
DOCS = Path(__file__).parents[2] / "docs"

# Kinds of states beside keys and values, or of other shapes in other layers, encoders, and code
# that reads no prompt in chunks: not served at all.
REFUSED = r"Only models that (keep keys and values|read a prompt in|give the same logits where)"
SENDS, READS = "aten::_to_copy to the card in", "aten::_local_scalar_dense in"
# What waits in transformers' own code, in slots and out of them.
OWN_WAITS = {
    "falcon": {f"{SENDS} models/falcon/modeling_falcon.py _split_heads"},
    "gemma3n_text": {f"{SENDS} models/gemma3n/modeling_gemma3n.py _gaussian_topk"},
    "gpt_neo": {f"{SENDS} models/gpt_neo/modeling_gpt_neo.py _attn"},
    "longcat_flash": {
        "aten::nonzero in models/longcat_flash/modeling_longcat_flash.py forward",
        f"{READS} models/longcat_flash/modeling_longcat_flash.py forward",
    },
    "phimoe": {f"{SENDS} models/phimoe/modeling_phimoe.py forward"},
}
# Out of slots each model makes its masks from a row's padding, which it reads.
MASKS = {
    f"{READS} masking_utils.py {name}"
    for name in ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
}
# In float16 torch's grouped products loop over the experts, and so do ours over their rows.
ONE_BY_ONE = ("experts.py", "routing.py", "low_rank.py", "integrations/moe.py")


def places(waits: list[str]) -> set[str]:
    """Return what waits, without the numbers of lines."""
    return {re.sub(r":\d+ ", " ", each) for each in waits}


@pytest.mark.parametrize("case", SLOW_CASES)
def test_only_known_places_wait(case, pretend):
    result = pretend("zoo_cases", case, "SLOW_CASES")
    assert result["merging"] == {"waits": [], "fits": True}
    if result["refused"]:
        assert re.match(REFUSED, result["refused"])
        assert result["not in slots"]
        return
    assert result["serving"]["fits"]
    assert result["serving"]["shape"] == [2]
    known = OWN_WAITS.get(case, set())
    if result["not in slots"]:
        assert places(result["serving"]["waits"]) <= known | MASKS
        return
    assert result["answering"]["tokens"] == [2] * 3
    if case in IN_FLOAT16:
        waits = [*result["answering"]["waits"], *result["serving"]["waits"]]
        assert waits
        assert all(any(file in each for file in ONE_BY_ONE) for each in waits)
        return
    for what in ("answering", "serving"):
        assert places(result[what]["waits"]) == known


def test_as_many_models_are_in_slots_as_the_page_says(pretend):
    models = [case for case in SLOW_CASES if case not in IN_FLOAT16]
    results = [pretend("zoo_cases", case, "SLOW_CASES") for case in models]
    served = [result for result in results if not result["refused"]]
    in_slots = [result for result in results if not result["not in slots"]]
    page = " ".join((DOCS / "gpu.md").read_text(encoding="utf-8").split())
    counted = re.search(r"of (\d+) models (\d+) are served .*?, (\d+) of these in slots", page)
    assert counted
    out = [name for name, result in zip(models, results, strict=True) if result["not in slots"]]
    assert [len(results), len(served), len(in_slots)] == [*map(int, counted.groups())], out
