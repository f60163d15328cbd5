"""Laws 3 and 12 where a batch's tokens are dealt over processes: their losses and gradients add up
to those of one process. Whatever mixes tokens elsewhere than in attention is refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import veneer
from support.closeness import assert_gradients_no_further, assert_no_further
from support.kinds import Kind
from support.plain import plain_pair
from support.random_adapters import examples, shake
from support.tiny_models import SHAPE, with_large_weights
from support.together import together
from veneer.data.packing import pack
from veneer.errors import ConfigError
from veneer.fused.forward import choose_forward
from veneer.kernels import dealt_packing
from veneer.models.sharded import shard_base
from veneer.processes.context import ContextGroup
from veneer.processes.world import World

PACKED = (17, 5, 30, 12, 5, 24, 2)
ONE_ROW = (61,)
LEAST = 3  # tokens of a piece, so that rows as short as these are cut


@dataclass(frozen=True)
class Case:
    """What is computed: a kind of adapter, over rows of these lengths."""

    kind: Kind
    lengths: tuple[int, ...] = PACKED
    recompute: str = "none"
    fused: bool = True  # whether layers are two functions, or attention alone is ours
    sharded: bool = False  # whether each process holds a part of the base

    def __str__(self) -> str:
        row = "" if len(self.lengths) > 1 else ", one row"
        own = "" if self.fused else ", the layers' own forward"
        shards = ", sharded" * self.sharded
        return f"{self.kind}{row}, {self.recompute}{own}{shards}"

    def pass_of(self, model: Any, context: ContextGroup | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss that this process computes, and its gradients."""
        rows = examples(list(self.lengths))
        chosen, _ = choose_forward(model, rows, recompute=self.recompute, context=context)
        assert chosen.layers
        assert chosen.recompute == self.recompute
        chosen = replace(chosen, tokens_step=4, layers=chosen.layers if self.fused else ())
        if context is not None:
            chosen = replace(chosen, context=replace(context, least=LEAST))
        loss = chosen(model, pack(rows, range(len(rows))))
        trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
        gradients = torch.autograd.grad(loss, list(trained.values()))
        return loss.detach(), dict(zip(trained, gradients, strict=True))


@dataclass(frozen=True)
class DynamicKind(Kind):
    """Over a Llama whose rotary embedding depends on the length of what it reads."""

    def base(self, dtype: torch.dtype = torch.float32) -> Any:
        config = LlamaConfig(
            **SHAPE | {"max_position_embeddings": 32},
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        )
        torch.manual_seed(0)
        return with_large_weights(AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype))


def kind(name: str, architecture: str, **lora: Any) -> Kind:
    return Kind(name, architecture, lora={"targets": "all"} | lora)


FAST = [
    Case(kind("lora", "llama"), ONE_ROW),
    Case(kind("dora", "gemma2", dora=True), recompute="selective"),
    Case(kind("lora", "gpt_oss"), recompute="full"),
]
SLOW = [
    *(
        Case(kind(name, architecture, dora=name == "dora"), lengths, recompute)
        for architecture in ("llama", "qwen3", "gemma2", "gemma3")
        for name in ("lora", "dora")
        for lengths in (PACKED, ONE_ROW)
        for recompute in ("none", "selective", "full")
    ),
    *(
        Case(kind("lora", architecture), lengths, recompute)
        for architecture in ("gpt_oss", "qwen3_moe", "gpt2", "falcon", "minigpt")
        for lengths in (PACKED, ONE_ROW)
        for recompute in ("none", "full")
    ),
    *(Case(kind("lora", each), fused=False) for each in ("llama", "gemma2", "gpt_oss")),
    Case(replace(kind("lora", "llama"), bits=4)),
    *(
        Case(kind("lora", "llama"), lengths, recompute, sharded=True)
        for lengths in (PACKED, ONE_ROW)
        for recompute in ("none", "selective", "full")
    ),
    Case(kind("embeddings", "llama", targets="everything")),
    Case(replace(kind("new tokens", "llama"), new_tokens=True)),
    Case(DynamicKind("dynamic", "llama", lora={"targets": "all"}), ONE_ROW),
]
REFUSED = [
    (Kind("prefix", "llama", method=veneer.Method("prefix")), "virtual tokens"),
    (kind("lora", "mamba2"), "cannot be packed"),
    (kind("lora", "falcon_h1"), "cannot be packed"),
]


def _write_sums(world: World, directory: Path, cases: list[Case]) -> None:
    group = ContextGroup.of(world, world.size)
    for number, case in enumerate(cases):
        # Keys and values of one head at a time, or of all.
        dealt_packing.NUMBERS_AT_ONCE = 1 if number % 2 else 2**23
        kind = case.kind
        if case.sharded:
            model = shake(kind.attached(shard_base(kind.base(), world)))
        else:
            model = kind.shaken()
        loss, gradients = case.pass_of(model, group)
        for tensor in (loss, *gradients.values()):
            world.add_up(tensor)
        if world.writes:
            torch.save((loss, gradients), directory / str(number))


def _refuse(world: World, group: ContextGroup | None) -> None:
    for each, why in REFUSED:
        with pytest.raises(ConfigError, match=f"(?s)over 2 processes.*{why}.*--context-parallel"):
            choose_forward(each.shaken(), examples(list(PACKED)), context=group)


def _fast(world: World, directory: Path) -> None:
    _write_sums(world, directory, FAST)
    _refuse(world, ContextGroup.of(world, 2))


def assert_equals_one_process(case: Case, directory: Path, number: int) -> None:
    loss, gradients = torch.load(directory / str(number), weights_only=True)
    model = case.kind.shaken()
    one_loss, one = case.pass_of(model, None)
    _, exact = plain_pair(case.kind, model)
    exact_loss = exact.loss(examples(list(case.lengths)))
    assert_no_further(loss, one_loss, exact_loss.detach(), f"loss of {case}")
    assert_gradients_no_further(gradients, one, exact.gradients(exact_loss))


def test_two_processes_equal_one(tmp_path: Path) -> None:
    together(_fast, 2, tmp_path)
    for number, case in enumerate(FAST):
        assert_equals_one_process(case, tmp_path, number)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "cases"), [(2, SLOW), (4, [*FAST, *SLOW[::4]])], ids=["2", "4"])
def test_processes_equal_one(size: int, cases: list[Case], tmp_path: Path) -> None:
    together(_write_sums, size, tmp_path, cases)
    for number, case in enumerate(cases):
        assert_equals_one_process(case, tmp_path, number)
