"""Law 9: a batch in which each row has adapters of its own equals separate runs."""

from typing import Any

import pytest
import torch
from torch import Tensor

import veneer
from support.closeness import assert_no_further
from support.interpreted import DEVICE, needs_triton
from support.kinds import Kind, each_kind, in_share, is_typical
from support.plain import Plain
from support.random_adapters import distance, ids, shake
from support.tiny_models import tiny
from veneer.adapter import linear
from veneer.adapter.active import active_adapters_of
from veneer.adapter.parameters import experts_of
from veneer.adapter.use import use_rows
from veneer.errors import AdapterError
from veneer.kernels import choice

# Some twice, some mixed, and the base between them.
ROWS = ["default", None, "wide", {"default": 0.7, "dora": -0.4}, "dora", "default", {"wide": 0.5}]


def beside_others(kind: Kind, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model with the kind's adapter, and with a wide one and a DoRA."""
    model = kind.fresh(dtype)
    veneer.attach(model, veneer.LoRA(rank=5, targets="all"), name="wide")
    dora = "attention" if any(experts_of(model)) else "all"  # there is no DoRA of experts
    veneer.attach(model, veneer.LoRA(rank=2, targets=dora, dora=True), name="dora")
    return shake(model, size=0.2).requires_grad_(False)


@torch.no_grad()
def separately(model: Any, tokens: Tensor) -> Tensor:
    logits = []
    for which, row in zip(ROWS, tokens, strict=True):
        veneer.use(model, which)
        logits.append(model(row[None], use_cache=False).logits)
    return torch.cat(logits)


@torch.no_grad()
def exactly(kind: Kind, model: Any, tokens: Tensor) -> Tensor:
    logits = []
    for which, row in zip(ROWS, tokens, strict=True):
        veneer.use(model, which)
        logits.append(Plain(kind, model, torch.float64).logits({"input_ids": row[None]}))
    return torch.cat(logits)


@each_kind(lambda kind: kind.mixes_rows, fast=in_share(5))
def test_rows_equal_separate_runs(kind, monkeypatch):
    model, tokens = beside_others(kind), ids(len(ROWS), 9)
    alone, exact = separately(model, tokens), exactly(kind, model, tokens)
    assert distance(alone[0], alone[1]) > 1e-3  # the adapters do something
    for most in (linear.STACKED_RANKS, 0):  # stacked and masked, or each over its own rows
        monkeypatch.setattr(linear, "STACKED_RANKS", most)
        use_rows(model, ROWS)
        together = model(tokens, use_cache=False).logits
        assert_no_further(together, alone, exact)
        veneer.use(model, None)
        assert active_adapters_of(model).row_updates is None


@needs_triton
@each_kind(lambda kind: str(kind) in ("lora, qwen2", "dora, llama"), fast=is_typical)
@torch.no_grad()
def test_rows_find_their_own_factors(kind, monkeypatch):
    """As on a card, where one kernel follows the factors' addresses."""
    model, tokens = beside_others(kind).to(DEVICE), ids(len(ROWS), 9).to(DEVICE)
    use_rows(model, ROWS)
    monkeypatch.setattr(choice, "mixed", lambda *_: "torch")
    stacked = model(tokens, use_cache=False).logits
    monkeypatch.setattr(choice, "mixed", lambda *_: "triton")
    together = model(tokens, use_cache=False).logits
    assert not torch.equal(together, stacked)  # it is another way
    assert_no_further(together, stacked, exactly(kind, model, tokens))


@each_kind(lambda kind: str(kind) in ("lora, qwen2", "dora, llama"), fast=is_typical)
def test_rows_in_bf16(kind):
    model, tokens = beside_others(kind, torch.bfloat16), ids(len(ROWS), 9)
    alone = separately(model, tokens)
    use_rows(model, ROWS)
    together = model(tokens, use_cache=False).logits
    assert_no_further(together, alone, exactly(kind, model.float(), tokens))


def test_the_base_alone_is_untouched():
    model = shake(veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets="all"), name="plain"))
    tokens = ids(2, 9)
    veneer.use(model, None)
    alone = model(tokens, use_cache=False).logits
    use_rows(model, [None, "plain"])
    together = model(tokens, use_cache=False).logits
    assert torch.equal(together[0], alone[0])
    assert not torch.equal(together[1], alone[1])


@each_kind(
    lambda kind: not kind.mixes_rows and not kind.replaces_weights and not kind.new_tokens,
    fast=in_share(0),
)
def test_what_acts_on_whole_batches_is_refused(kind):
    model = kind.attached()
    if kind.architecture == "mamba":
        use_rows(model, ["default", None])
        with pytest.raises(AdapterError, match="the weight of dt_proj"):
            kind.says(model)
        return
    with pytest.raises(AdapterError, match="default has no low-rank factors"):
        use_rows(model, ["default", None])


def test_a_name_that_is_unknown():
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2), name="plain")
    with pytest.raises(AdapterError, match="did you mean 'plain'"):
        use_rows(model, ["plian"])
