"""Law 9: a batch in which each row has adapters of its own equals separate runs."""

from typing import Any

import pytest
import torch

import veneer
from support.random_adapters import distance, ids, shake, targets_named
from support.tiny_models import ARCHITECTURES, quantized, tiny
from veneer.adapter import linear
from veneer.adapter.active import active_adapters_of
from veneer.adapter.attach import use_rows
from veneer.errors import AdapterError

# Different ranks, targets and kinds, some of them twice, some mixed, and the base between them.
ROWS = ["plain", None, "wide", {"plain": 0.7, "dora": -0.4}, "dora", "plain", {"wide": 0.5}]


def adapted(model: Any) -> Any:
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"rank": 2, "targets": targets_named(model, "all")},
        "wide": {"rank": 5, "targets": targets_named(model, "everything")},
        "dora": {"rank": 3, "targets": targets_named(model, "attention"), "dora": True},
    }
    for name, kind in kinds.items():
        veneer.attach(model, veneer.LoRA(**kind), name=name)
    return shake(model, size=0.2).requires_grad_(False)


def separately(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    found = []
    for which, row in zip(ROWS, tokens, strict=True):
        veneer.use(model, which)
        found.append(model(row[None], use_cache=False).logits)
    return torch.cat(found)


def assert_rows_agree(model: Any, close: float) -> None:
    tokens = ids(len(ROWS), 9)
    wanted = separately(model, tokens)
    assert distance(wanted[0], wanted[1]) > 0.2  # the adapters do something
    use_rows(model, ROWS)
    assert distance(model(tokens, use_cache=False).logits, wanted) < close
    veneer.use(model, None)
    assert active_adapters_of(model).row_updates is None


@pytest.mark.parametrize("most", [1024, 0], ids=["stacked", "own rows"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows(architecture, most, monkeypatch):
    monkeypatch.setattr(linear, "STACKED_RANKS", most)
    assert_rows_agree(adapted(tiny(architecture)), 2e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "minigpt"])
def test_over_packed_weights(architecture, bits):
    assert_rows_agree(adapted(quantized(architecture, bits)), 2e-6)


def test_in_float64_and_bfloat16():
    assert_rows_agree(adapted(tiny("qwen2").double()), 1e-7)  # factors are float32 masters
    assert_rows_agree(adapted(tiny("qwen2", dtype=torch.bfloat16)), 2e-2)


def test_the_base_alone_is_untouched():
    model = adapted(tiny("llama"))
    tokens = ids(2, 9)
    veneer.use(model, None)
    wanted = model(tokens, use_cache=False).logits
    use_rows(model, [None, "plain"])
    found = model(tokens, use_cache=False).logits
    assert torch.equal(found[0], wanted[0])
    assert not torch.equal(found[1], wanted[1])


def test_what_cannot_act_by_rows():
    model = adapted(tiny("llama"))
    with pytest.raises(AdapterError, match="did you mean 'plain'"):
        use_rows(model, ["plian"])
    veneer.attach(model, veneer.Method("prompt", virtual_tokens=2), name="prompt")
    with pytest.raises(AdapterError, match="prompt has no low-rank factors"):
        use_rows(model, ["plain", {"prompt": 1.0}])
