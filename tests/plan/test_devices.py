"""A run over several devices: how they are written, what each holds and sends, and what fits."""

import re
from functools import cache
from pathlib import Path

import pytest

from veneer import LoRA
from veneer.cli.app import run
from veneer.errors import ConfigError
from veneer.plan.config import PlanConfig
from veneer.plan.devices import DevicePlan, best, choose_shard, least_changes, whole_by_time
from veneer.plan.find import find_sizes
from veneer.plan.hardware import Devices, devices_of, link_of
from veneer.plan.methods import adapted_layers
from veneer.plan.plan import make_plan

GB = 10**9
preset = cache(find_sizes)


def plan_of(name, **settings):
    sizes = preset(name)
    return make_plan(PlanConfig(**settings), sizes, adapted_layers(sizes, LoRA(rank=16)))


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("8x24GB", Devices(8, 24 * GB)),
        (" 2 X 80 gib", Devices(2, 80 * 2**30)),
        ("1x0.5t", Devices(1, GB * 500)),
    ],
)
def test_devices_are_a_number_and_the_memory_of_each(text, devices):
    assert devices_of(text) == devices


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (text, "such as 8x24GB or 4x80GiB")
            for text in ("8", "x24GB", "0x24GB", "8x24", "8*2GB")
        ),
        *((text, "such as 8x24GB or 4x80GiB") for text in ("", "-1x2GB", "8x0GB", "9999999x1GB")),
        ("8x24GB,2x80GiB", "write 10x24GB"),
        ("2x80GiB, 8X24 GB", "write 10x24 GB"),
        ("8x24GB,two", "such as 8x24GB"),
    ],
)
def test_other_lists_of_devices_are_refused_with_what_to_write(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        devices_of(text)


def test_a_link_is_bytes_a_second():
    assert link_of("10GB/s") == 10 * GB
    assert link_of("900 MiB / S") == 900 * 2**20
    for text in ("10GB", "10GB/h", "/s", "0GB/s"):
        with pytest.raises(ConfigError, match="such as 10GB/s"):
            link_of(text)


@pytest.mark.parametrize("settings", [{}, {"bits": 8}, {"method": "qlora"}])
def test_a_sharded_base_is_a_share_and_two_buffers_and_what_is_outside(settings):
    plan = plan_of("llama-2-7b", **settings)
    one, eight = DevicePlan(plan, 1, "base"), DevicePlan(plan, 8, "base")
    share, gathered, rest = (each.value for each in eight.weights)
    whole = plan.memory.weights.value
    assert share * 8 + rest == pytest.approx(whole, rel=1e-5)
    assert rest == 4096 * 2  # the last norm
    blocks = eight.weights[1].terms
    assert len(blocks) == 2
    assert gathered >= 2 * (8 * share - 2 * 32000 * 4096 * 2) / 32
    assert eight.peak - sum(each.value for each in eight.weights) == plan.memory.peak - whole
    assert one.weights[0].value == pytest.approx(8 * share, rel=1e-5)
    assert DevicePlan(plan, 8).peak == plan.memory.peak


def test_a_ring_sends_gradients_twice_and_the_base_forward_and_backward():
    plan = plan_of("llama-2-7b")
    for n in (2, 8):
        way = DevicePlan(plan, n, "base", passes=3)
        gradient, base = (each.value for each in way.sent)
        once = plan.memory.gradients.value * (n - 1) // n
        assert gradient == 2 * once + 2 * 4 * 8 * (n - 1) // n  # of one replicated a number more
        block, outside = (way._shards.order[i].chunk for i in (1, 0))
        # The last block is still there on the way back, and the first when the next pass begins.
        assert base == (n - 1) * 3 * (2 * 31 * block + 2 * outside)
        assert DevicePlan(plan, n).sent_bytes == gradient + 2 * 8 * (n - 1) // n
    assert DevicePlan(plan, 1, "base").sent_bytes == 0


def test_blocks_that_no_gradient_passes_are_gathered_once():
    sizes = preset("llama-2-7b")
    upper = adapted_layers(sizes, LoRA(layers="16:32"))
    way = DevicePlan(make_plan(PlanConfig(), sizes, upper), 4, "base")
    block, outside = (way._shards.order[i].chunk for i in (1, 0))
    assert way.sent[1].value == 3 * ((32 + 15) * block + 2 * outside)


def test_a_tied_head_is_held_once_and_gathered_twice():
    way = DevicePlan(plan_of("smollm2-135m"), 3, "base")
    first, *_, last = way._shards.order
    assert first is last
    assert way.weights[0].value == first.chunk + 30 * way._shards.order[1].chunk


def test_tokens_dealt_over_devices_keep_less_and_exchange_keys_and_values():
    plan = plan_of("llama-2-7b", tokens_per_batch=8192)
    whole, pieces = DevicePlan(plan, 4), DevicePlan(plan, 4, pieces=4)
    assert pieces.activations == pytest.approx(whole.activations / 4, rel=0.01)
    # Of 32 blocks: forward, again backward, and the gradients, each to 3 others of 4.
    once = 32 * 8192 * 2 * 4096 * 2 * 3 // 4
    assert [each.value for each in pieces.sent[1:]] == [2 * once, once]
    again = plan_of("llama-2-7b", tokens_per_batch=8192, recompute="full")
    assert DevicePlan(again, 4, pieces=4).sent[1].value == 3 * once


@pytest.mark.parametrize(
    ("memory", "sharded"), [(48, "none"), (24, "none"), (12, "base"), (5, "base"), (2, None)]
)
def test_the_base_is_sharded_only_where_it_does_not_fit_whole(memory, sharded):
    plan = plan_of("llama-2-7b", recompute="full")
    assert choose_shard(plan, 8, memory * GB) == sharded
    way = best(plan, 8, memory * GB)
    assert (way and way.sharded) == sharded


def test_what_trains_or_is_mapped_is_not_sharded():
    for settings in ({"method": "full"}, {"method": "qlora", "mapped": True}):
        plan = plan_of("llama-2-7b", **settings)
        assert choose_shard(plan, 8, plan.memory.peak - 1) is None
    assert DevicePlan(plan_of("gpt2", method="full"), 2).sent_bytes == 4 * 124_439_808 + 40


@pytest.mark.parametrize(
    ("name", "settings", "count", "memory", "least"),
    [
        ("llama-2-70b", {}, 8, 24, 2),
        ("llama-2-70b", {}, 2, 80, 3),
        ("llama-2-7b", {"tokens_per_batch": 65536, "max_length": 65536}, 4, 24, 3),
    ],
)
def test_every_change_fits_and_what_is_less_does_not(name, settings, count, memory, least):
    plan = plan_of(name, **settings)
    assert best(plan, count, memory * GB) is None
    changes = least_changes(plan, count, memory * GB)
    assert len(changes) >= least
    for way in changes:
        assert way.peak <= memory * GB
        if way.count > count:
            assert DevicePlan(plan, way.count - 1, "base").peak > memory * GB
        elif way.pieces > 1:
            assert best(way.plan, count, memory * GB) is None


def test_a_gentler_setting_may_spare_sharding():
    plan = plan_of("llama-2-7b", tokens_per_batch=8192)
    memory = DevicePlan(plan, 2, "base").peak
    assert choose_shard(plan, 2, memory) == "base"
    whole = whole_by_time(plan, memory)
    assert whole.config.base_bits == 16
    assert whole.memory.peak <= memory


def printed(capsys, *arguments):
    assert run(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    return re.sub(r"\s+", " ", out)


def test_devices_are_planned_with_what_would_fit(capsys):
    text = printed(capsys, "llama-2-7b", "--devices", "8x4GB", "--formulas", "--tokens", "1024")
    assert "8 devices of 4.0 GB (GB: 10⁹ bytes): it does not fit." in text
    assert "It would fit with" in text
    assert re.search(r"32 × [\d,]+ bytes \(1 / 8 of [\d,]+\)", text)
    assert "0.8750 (7 / 8) × " in text
    text = printed(
        capsys, "llama-2-7b", "--devices", "4x24GB", "--link", "1GB/s", "--tokens", "256"
    )
    assert "it fits, with the whole base on each (replicated)" in text
    assert re.search(r"A step of 1,024 tokens sends .* s at 1.0 GB/s", text)
    text = printed(capsys, "gpt2", "--devices", "4x100MB")
    assert "it does not fit, whatever its settings." in text


def test_what_the_docs_say_the_planner_prints_is_what_it_prints(capsys):
    text = (Path(__file__).parents[2] / "docs/scale.md").read_text(encoding="utf-8")
    shown = re.findall(r"```\n\$ veneer (plan [^\n]+)\n(.*?)\n```", text, flags=re.DOTALL)
    assert [command.split()[-1] for command, _ in shown] == ["8x24GB", "10GB/s"]
    for command, expected in shown:
        assert run(command.split()) == 0
        lines = (line.rstrip() for line in capsys.readouterr().out.strip().splitlines())
        assert "\n".join(lines) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "8"], "such as 8x24GB"),
        (["--devices", "8x24GB", "--memory", "24GB"], "leave out --memory"),
        (["--link", "10GB/s"], "give --devices too"),
        (["--devices", "8x24GB", "--link", "10"], "such as 10GB/s"),
    ],
)
def test_flags_of_devices_that_cannot_be_end_with_2(capsys, arguments, message):
    assert run(["plan", "gpt2", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
