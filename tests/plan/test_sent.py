"""Bytes that a plan says a process sends in a step, against those that World counts."""

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import veneer
from support.random_adapters import examples
from support.tiny_models import quantized, tiny
from veneer.data.packing import StepOrder
from veneer.fused.forward import choose_forward
from veneer.models import sharded
from veneer.plan.config import PlanConfig
from veneer.plan.devices import DevicePlan
from veneer.plan.find import sizes_of
from veneer.plan.methods import adapted_layers
from veneer.plan.plan import make_plan
from veneer.processes.world import World
from veneer.training.optimizer import FlatAdamW
from veneer.training.step import StepToLearn, learn

LENGTHS = [30, 20, 25, 15]


@pytest.fixture
def world(monkeypatch):
    """This process as the first of three that do not exist: exchanges are counted, and leave what
    they are given as it is, or zeros of what others would have."""
    begin = sharded.begin_gathering

    def of_nobody(own, whole, world):
        gathering = begin(own, whole, world)
        whole.zero_()[: len(own)] = own
        return gathering

    monkeypatch.setattr(sharded, "begin_gathering", of_nobody)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    yield World.current()
    dist.destroy_process_group()


@pytest.mark.parametrize("shard", ["none", "base"])
@pytest.mark.parametrize(
    ("architecture", "bits", "layers", "recompute"),
    [
        ("llama", 16, None, "none"),
        ("qwen2", 16, "1:", "full"),
        ("llama", 4, None, "selective"),
        ("gpt2", 8, None, "none"),
    ],
)
@pytest.mark.thinned
def test_what_is_planned_to_be_sent_is_what_is_sent(
    architecture, bits, layers, recompute, shard, world
):
    model = tiny(architecture) if bits == 16 else quantized(architecture, bits)
    lora = veneer.LoRA(rank=3, layers=layers)
    if shard == "base":
        sharded.shard_base(model, world)
    veneer.attach(model, lora, seed=0)
    rows = examples(LENGTHS)
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    optimizer = FlatAdamW(weights, lr=1e-3, weight_decay=0.0)
    forward, _ = choose_forward(model, rows, recompute=recompute)
    model.train()
    order = StepOrder(LENGTHS, 90, 20, seed=0)
    step = order.epoch(0)[0]

    def train() -> None:
        asked = StepToLearn(rows, step, optimizer, order, lr=0.1, clip=1.0)
        learn(model, forward, asked, world=world)

    with forward.installed(model):
        train()
        before = dict(world.sent.bytes_of)
        train()
        world.any(False)  # whether to stop, as in each step of the loop
    counted = {
        kind: number - before.get(kind, 0)
        for kind, number in world.sent.bytes_of.items()
        if number != before.get(kind, 0)
    }
    sizes = sizes_of(model.config)
    config = PlanConfig(
        method="qlora" if bits < 16 else "lora",
        bits=bits if bits < 16 else None,
        dtype="float32",
        recompute=recompute,
        tokens_per_batch=20,
    )
    plan = make_plan(config, sizes, adapted_layers(sizes, lora))
    way = DevicePlan(plan, 3, shard, passes=len(order.deal(step, 3)[0]))
    planned = {kind: sum(term.value for term in terms) for kind, terms in way.given.items()}
    assert counted == planned
