"""A base that two processes share computes what it does whole, to the bit, however it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import veneer
from support import worlds
from support.closeness import assert_no_further
from support.published_bases import published
from support.random_adapters import examples, tokenizer, with_new_tokens
from support.tiny_models import quantized, source, tiny
from support.together import together
from veneer.data.packing import pack
from veneer.errors import AdapterError, ConfigError, ModelError
from veneer.formats.quantized import write_quantized
from veneer.fused.forward import choose_forward
from veneer.fused.recompute import Recompute
from veneer.models import block_buffers
from veneer.models.block_buffers import passes_of, whole
from veneer.models.fingerprint import fingerprint
from veneer.models.load import load_base
from veneer.models.sharded import bytes_a_pass, shard_base
from veneer.processes.world import World
from veneer.quant.stack import quantized_weights


@dataclass(frozen=True)
class Case:
    """A pass over a base, forward and backward."""

    architecture: str = "llama"
    bits: int | None = None
    what: Any = field(default_factory=lambda: veneer.LoRA(rank=3))
    recompute: Recompute = "none"
    padded: bool = False
    new_tokens: bool = False

    def model(self, world: World | None) -> Any:
        """Return the model with what trains; sharded over a world."""
        model = quantized(self.architecture, self.bits) if self.bits else tiny(self.architecture)
        if world is not None:
            shard_base(model, world)
        added = with_new_tokens(model, tokenizer()) if self.new_tokens else None
        veneer.attach(model, self.what, seed=0)
        for rows in added.parameters() if added else ():
            rows.requires_grad_(True)
        generator = torch.Generator().manual_seed(1)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
        return model


CASES = {
    "selective": Case(recompute="selective"),
    "full": Case(recompute="full"),
    "padded": Case(padded=True),
    "dora": Case(what=veneer.LoRA(rank=3, dora=True)),
    "pissa": Case(what=veneer.LoRA(rank=3, init="pissa")),
    "some layers": Case(what=veneer.LoRA(rank=3, targets=("re:.*layers.1.*",))),
    "NF4": Case(bits=4),
    "NF4, dora, padded": Case(bits=4, what=veneer.LoRA(rank=3, dora=True), padded=True),
    "int8, full": Case(bits=8, recompute="full"),
    "untied, new tokens": Case("qwen2", new_tokens=True),
    "conv1d": Case("gpt2"),
    "conv1d, padded": Case("gpt2", padded=True),
    "experts": Case("qwen3_moe"),
    "experts, NF4": Case("qwen3_moe", bits=4),
    "prefix": Case(what=veneer.Method("prefix", virtual_tokens=4)),
}


@dataclass
class Passed:
    """What the second of two equal passes gave."""

    loss: Tensor
    gradients: Mapping[str, Tensor]
    sent: int
    logits: Tensor


def passed(model: Any, case: Case, world: World) -> Passed:
    rows = examples([9, 13, 5])
    forward, _ = choose_forward(model, rows, recompute=case.recompute)
    if case.padded:
        forward = replace(forward, packed=False, head=None, layers=())
    batch = pack(rows, range(len(rows)))
    for _ in range(2):
        before = world.sent.bytes_of.get("shards", 0)
        model.zero_grad()
        loss = forward(model, batch)
        loss.backward()
    sent = world.sent.bytes_of.get("shards", 0) - before
    weights = {name: w for name, w in model.named_parameters() if w.grad is not None}
    gradients = {name: weight.grad.clone() for name, weight in weights.items()}
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[3, 4, 5]])).logits
    return Passed(loss.detach(), gradients, sent, logits)


def frozen(model: Any) -> list[Tensor]:
    """Return copies of all that is frozen."""
    with whole(model):
        weights = [w for w in model.parameters() if not w.requires_grad]
        codes = [t for q in quantized_weights(model).values() for t in q.tensors().values()]
        return [tensor.detach().clone() for tensor in (*weights, *codes)]


def assert_same_pass(case: Case, world: World, name: str) -> None:
    expected = passed(case.model(None), case, World())
    model = case.model(world)
    before = frozen(model)
    result = passed(model, case, world)
    assert torch.equal(result.loss, expected.loss), name
    assert result.gradients.keys() == expected.gradients.keys(), name
    for path, gradient in expected.gradients.items():
        assert torch.equal(result.gradients[path], gradient), (name, path)
    assert torch.equal(result.logits, expected.logits), name
    assert all(map(torch.equal, before, frozen(model))), name
    passes = passes_of(model)
    assert passes is not None
    if name not in ("some layers", "padded", "prefix"):
        assert result.sent == bytes_a_pass(passes), name


def assert_refuses(world: World, place: Path) -> None:
    model = shard_base(tiny("llama"), world)
    with pytest.raises(ConfigError, match="sharded"):
        veneer.attach(model, veneer.Method("full"))
    veneer.attach(model, veneer.LoRA(rank=2), seed=0)
    with pytest.raises(AdapterError, match="sharded"):
        veneer.merge(model)


def assert_loads_alike(world: World, place: Path) -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    for name, options in [
        ("llama", {"dtype": "float32"}),
        ("llama", {"dtype": "bf16"}),
        ("llama", {"dtype": "float32", "bits": 8}),
        ("llama-4", {"dtype": "float32"}),
        ("qwen3_moe", {"dtype": "float32", "bits": 4}),
        ("qwen3_moe-4", {"dtype": "float32"}),
        ("llama-fp8", {"dtype": "float32"}),
        ("llama-gptq", {"dtype": "float32"}),
        ("qwen3_moe-fp8", {"dtype": "float32"}),
    ]:
        base, alone = (
            load_base(place / name, tokenizer=tokenizer(), world=w, **options).model  # type: ignore[arg-type]
            for w in (world, World())
        )
        assert fingerprint(base) == fingerprint(alone), name
        assert torch.equal(base(input_ids=ids).logits, alone(input_ids=ids).logits), name
        answers = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (base, alone)]  # type: ignore[operator]
        assert torch.equal(*answers), name


def assert_saves_alike(world: World, place: Path) -> None:
    case = Case(bits=4)
    model, alone = case.model(world), case.model(None)
    if world.writes:  # no exchange: the others do not take part
        for each, name in ((model, "sharded"), (alone, "alone")):
            veneer.save(each, place / name)
    dist.barrier()
    for each, name in ((model, "alone"), (alone, "sharded")):
        veneer.load(each, place / name, name="again")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(input_ids=ids).logits, alone(input_ids=ids).logits)


def _work(world: World, place: Path) -> None:
    block_buffers.SMALL = 100  # or what is quantized of so small models would not be sharded
    checks: list[Callable[[World, Path], None]] = [
        assert_refuses,
        assert_loads_alike,
        assert_saves_alike,
    ]
    for name, case in CASES.items():
        assert_same_pass(case, world, name)
    for check in checks:
        check(world, place)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_sharded_base_computes_what_the_whole_does(size: int, tmp_path: Path) -> None:
    for architecture in ("llama", "qwen3_moe"):
        place = tmp_path / architecture
        tiny(architecture).save_pretrained(place)
        out = tmp_path / f"{architecture}-4"
        for _ in write_quantized(source(architecture), tokenizer(), out, bits=4, name=str(place)):
            pass
    for architecture, name in (("llama", "fp8"), ("llama", "gptq"), ("qwen3_moe", "fp8")):
        (tmp_path / f"{architecture}-{name}").symlink_to(published(architecture, name)[0])
    together(_work, size, tmp_path)


def test_a_model_without_known_layers_is_not_sharded() -> None:
    model = tiny("llama")
    model.model.layers = torch.nn.ModuleDict({str(i): m for i, m in enumerate(model.model.layers)})
    with pytest.raises(ModelError, match="layers of this model are not known"):
        shard_base(model, World(0, 2))


TRAINED = {
    "lora": worlds.Case(),
    "lora+": worlds.Case(course={"lora_plus_ratio": 6.0}),
    "full": worlds.Case(course={"recompute": "full"}),
    "dora, padded": worlds.Case(what=veneer.LoRA(rank=3, dora=True), padded=True),
    "new tokens": worlds.Case(architecture="qwen2", new_tokens=True),
    "NF4": worlds.Case(bits=4),
    "int8": worlds.Case(bits=8),
    "prefix": worlds.Case(what=veneer.Method("prefix", virtual_tokens=5)),
    "bf16": worlds.Case(dtype=torch.bfloat16),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_training_over_a_sharded_base_is_that_of_one_process(size: int, tmp_path: Path) -> None:
    cases = {name: replace(case, sharded=True) for name, case in TRAINED.items()}
    results = worlds.trained_by(size, cases, tmp_path)
    for name, case in TRAINED.items():
        ours = results[0][name]
        assert ours.error == "", name
        assert all(result[name].events == ours.events for result in results), name
        alone = worlds.trained(case, World(), tmp_path)
        if case.bits or case.dtype == torch.bfloat16:  # as near as with other batches
            course = {**case.course, "tokens_per_batch": 40}
            peer = worlds.trained(replace(case, course=course), World(), tmp_path)
            reference = alone
        else:
            wide = replace(case, wide=True)
            peer, reference = alone, worlds.trained(wide, World(), tmp_path)
        assert_no_further(ours.losses, peer.losses, reference.losses, f"{name}: losses")
        assert_no_further(ours.flat, peer.flat, reference.flat, f"{name}: weights")
