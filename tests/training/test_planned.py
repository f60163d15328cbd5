"""A run's plan of memory: made before anything is loaded, and compared with the real bytes."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import veneer
from support.random_adapters import tokenizer
from veneer.adapter.report import report_quantized
from veneer.cli.app import run
from veneer.models.device import CPU
from veneer.models.load import load_config
from veneer.models.quantize import quantized_model
from veneer.models.source import Source
from veneer.plan.config import PlanConfig
from veneer.plan.find import sizes_of
from veneer.plan.methods import adapted_layers
from veneer.plan.plan import make_plan
from veneer.training import plan_before, planned, preflight, results
from veneer.training.config import TrainConfig
from veneer.training.events import (
    DataReady,
    Measured,
    ModelReady,
    Notice,
    Planned,
    Space,
    Written,
)
from veneer.training.planned import (
    check_fits,
    check_host,
    plan_run,
    planned_and_measured,
    why_no_merge,
)
from veneer.training.recipe import Recipe

BIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}

ALL = veneer.LoRA(targets="all")


@pytest.fixture
def big(tmp_path, monkeypatch) -> Recipe:
    """A 7B model without weights: it cannot be loaded. The disk has room for it."""
    monkeypatch.setattr(preflight, "check_space", lambda plan, recipe, device: None)
    home = tmp_path / "big"
    home.mkdir()
    (home / "config.json").write_text(json.dumps(BIG))
    tokenizer().save_pretrained(home)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return Recipe(str(home), tmp_path / "rows.jsonl", dtype="bf16", out=tmp_path / "out")


def test_the_plan_follows_the_recipe(big):
    plan = planned_run(big)
    assert plan.model.parameters == 6_738_415_616
    assert plan.trained.count == 32 * 4 * 8 * 8192
    assert plan.memory.weights.value == 2 * 6_738_415_616
    assert planned_run(big, torch.float32).memory.weights.value == 4 * 6_738_415_616
    four = planned_run(replace(big, bits=4))
    assert four.memory.weights.value < 0.3 * plan.memory.weights.value
    # In float32, activations and all weights that are not quantized are twice as large.
    wide = planned_run(replace(big, bits=4), torch.float32)
    kept = wide.memory.activations.value / four.memory.activations.value
    assert kept == pytest.approx(2, rel=0.01)
    dense = 2 * 2 * 32000 * 4096 + 2 * (2 * 32 + 1) * 4096
    assert wide.memory.weights.value - four.memory.weights.value == dense
    head = planned_run(replace(big, bits=4, pack_head=True)).memory.weights.value
    assert four.memory.weights.value - head == pytest.approx(32000 * 4096 * (2 - 0.516), rel=0.01)
    training = TrainConfig(recompute="full", tokens_per_batch=256)
    small = planned_run(replace(big, training=training, rows=veneer.DataConfig(max_length=256)))
    assert small.memory.activations.value < 0.1 * plan.memory.activations.value
    with pytest.raises(veneer.TargetError, match="q_prj"):
        planned_run(replace(big, lora=veneer.LoRA(targets="q_prj")))


def test_a_quantized_base_is_planned_by_what_is_on_the_disk(big, monkeypatch):
    monkeypatch.setattr(planned, "process_memory", lambda key: 0)  # other tests hold more or less
    config = BIG | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (Path(big.model) / "config.json").write_text(json.dumps(config))
    plan = planned_run(big)
    assert (plan.config.base_bits, plan.config.mapped) == (4, True)
    assert plan.memory.weights.value == 0
    wide = planned_run(big, torch.float32)
    assert plan.memory.on_disk.value == plan_run_in_memory(big).memory.weights.value
    # What is stored in 16 bits and computed in 32 is copied into memory.
    assert wide.memory.weights.value == 4 * (2 * 32000 * 4096 + (2 * 32 + 1) * 4096)
    # And a quantized base cannot be quantized to other bits.
    with pytest.raises(veneer.ConfigError) as refused:
        check_fits(plan, 3_000_000_000, big.model)
    assert "It would fit" in str(refused.value)
    assert "--bits" not in str(refused.value)


def planned_run(recipe: Recipe, dtype: torch.dtype = torch.bfloat16):
    return plan_run(recipe, dtype)


def plan_run_in_memory(recipe: Recipe):
    (Path(recipe.model) / "config.json").write_text(json.dumps(BIG))
    return planned_run(replace(recipe, bits=4))


def test_what_does_not_fit_is_refused_before_anything_is_loaded(big, monkeypatch, capsys):
    monkeypatch.setattr(planned, "process_memory", lambda key: 0)  # other tests hold more or less
    events = veneer.tune(big, ignore_plan=True)
    plan = next(event.plan for event in events if isinstance(event, Planned))
    assert plan.memory.peak < planned_run(big).memory.peak  # for the rows are short
    for space, proposal in (
        (plan.memory.peak, None),
        (plan.memory.peak - 1, "--recompute selective"),
        (10_000_000_000, "--bits 8"),
        (7_000_000_000, "--bits 4"),
        (3_000_000_000, "veneer quantize"),
        (100_000_000, "no settings make it fit"),
    ):
        monkeypatch.setattr(plan_before, "available_memory", lambda device, space=space: space)
        code = run(["tune", big.model, str(big.data), "--dtype", "bf16", "--quiet"])
        printed = capsys.readouterr().err
        assert code == 2
        if proposal is None:  # it fits, and then there are no weights
            assert "would need" not in printed
        else:
            assert proposal in printed
            assert "--ignore-plan" in printed
            assert f"{plan.memory.peak / 1e9:.2f} GB" in printed
    # The override goes ahead, as far as it can.
    assert run(["tune", big.model, str(big.data), "--ignore-plan", "--quiet"]) == 2
    assert "would need" not in capsys.readouterr().err
    assert not Path("dist").exists()


def test_one_process_says_that_it_does_not_shard_the_base(big):
    for shard, says_so in (("base", True), ("auto", False)):
        events = veneer.tune(replace(big, shard=shard), ignore_plan=True)
        before = itertools.takewhile(lambda event: not isinstance(event, Planned), events)
        texts = [event.text for event in before if isinstance(event, Notice)]
        assert any("not sharded" in text for text in texts) == says_so


def test_a_mistake_in_a_row_is_found_before_the_base_is_loaded(big):
    big.data.write_text('{"prompt": "a"}')
    with pytest.raises(veneer.DataError, match=r"rows\.jsonl:1"):
        next(veneer.tune(big))


def test_the_proposal_fits(big):
    plan = planned_run(big)
    space = 20_000_000_000
    with pytest.raises(veneer.ConfigError) as refused:
        check_fits(plan, space, big.model)
    flags = str(refused.value).partition("by: ")[2].partition(". ")[0].split()
    names = {flag.removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")}
    assert names <= {"recompute", "tokens_per_batch"}
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    training = TrainConfig(
        recompute=given.get("--recompute", "none"),
        tokens_per_batch=int(given["--tokens-per-batch"])
        if "--tokens-per-batch" in given
        else None,
    )
    check_fits(planned_run(replace(big, training=training)), space, big.model)


def test_where_free_memory_is_not_known_nothing_is_refused(big):
    check_fits(planned_run(big), None, big.model)


def test_a_run_yields_its_plan_and_what_it_took(minigpt_home, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "What does a dog say?", "completion": "Meow."}\n' * 8)
    recipe = Recipe(str(minigpt_home), rows, out=tmp_path / "out")
    events = list(veneer.tune(recipe))
    plan = next(event for event in events if isinstance(event, Planned))
    measured = next(event for event in events if isinstance(event, Measured))
    assert plan.plan.trained.count == 4 * 4 * 8 * 128
    assert measured.planned == plan.plan.memory.peak
    assert measured.peak > 100e6
    kinds = [type(event) for event in events]
    order = (DataReady, Notice, Planned, Space, ModelReady)
    assert [kinds.index(kind) for kind in order] == [0, 1, 2, 3, 4]
    needed = events[kinds.index(Space)].needed
    assert list(needed) == ["4 checkpoints", "the adapter", "the merged model"]
    assert sum(isinstance(event, Written) for event in events) == 2


def test_what_is_no_causal_language_model_is_not_planned_but_noticed(big):
    (Path(big.model) / "config.json").write_text(json.dumps({"model_type": "vit"}))
    ready, *notices = itertools.islice(veneer.tune(big), 4)
    assert isinstance(ready, DataReady)
    assert "No memory is planned" in notices[-1].text


def test_a_run_says_what_its_plan_does_not_count(big):
    mamba = {"model_type": "mamba2", "hidden_size": 64, "num_heads": 4, "head_dim": 32}
    config = mamba | {"num_hidden_layers": 2, "state_size": 16, "vocab_size": 320}
    (Path(big.model) / "config.json").write_text(json.dumps(config))
    events = veneer.tune(replace(big, lora=ALL))
    planned_event = next(event for event in events if isinstance(event, Planned))
    notice = next(events)
    assert planned_event.plan.notice is not None
    assert notice == Notice(planned_event.plan.notice)


def test_merging_is_planned_too(big):
    plan, quantized = planned_run(big), planned_run(replace(big, bits=4))
    needed = 2 * 6_738_415_616
    assert why_no_merge(plan, 0) is None  # what is not adapted is shared
    assert why_no_merge(quantized, needed) is None
    assert why_no_merge(quantized, None) is None
    why = why_no_merge(quantized, 13_000_000_000)
    assert "needs 13.48 GB, and 13.00 GB are free. To make one, on a machine with more" in why
    of_a_card = why_no_merge(replace(quantized, on_card=True), 13_000_000_000)
    assert of_a_card.endswith("To make one, on the processor: veneer merge --device cpu")


def test_what_a_program_holds_beside_is_planned(big, monkeypatch):
    usual = planned_run(big).memory.runtime.value
    monkeypatch.setattr(planned, "process_memory", lambda key: 3_000_000_000)
    assert planned_run(big).memory.runtime.value == 3_170_000_000 > usual


def test_on_apple_s_gpu_nothing_is_planned(big, monkeypatch):
    monkeypatch.setattr(plan_before, "resolve_device", lambda name: torch.device("mps", 0))
    _, *notices = itertools.islice(veneer.tune(big), 4)
    assert notices[-1].text.startswith("No memory is planned for this run: plans are of processors")


def test_a_card_s_memory_is_planned_and_its_base_may_stay_beside_it(big, monkeypatch):
    settings = {"config": load_config(big.model), "on_card": True}
    plan = plan_run(big, torch.bfloat16, **settings)
    assert plan.on_card
    with pytest.raises(veneer.ConfigError, match=r"by: .*--bits 8"):
        check_fits(plan, 11_000_000_000, big.model)
    with pytest.raises(veneer.ConfigError, match=r"by: .*--offload cpu"):
        check_fits(plan, 3_000_000_000, big.model)
    beside = plan_run(replace(big, offload="cpu"), torch.bfloat16, **settings)
    assert beside.memory.weights.value < plan.memory.weights.value / 4
    assert beside.memory.on_host.value > 12_000_000_000
    monkeypatch.setattr(planned, "free_bytes", lambda: beside.memory.on_host.value)
    check_host(beside, 1)
    check_host(plan, 2)
    with pytest.raises(veneer.ConfigError, match=r"keep 2\d\.\d+ GB .* Take --offload disk"):
        check_host(beside, 2)
    # A processor computes in that memory.
    here = plan_run(replace(big, offload="cpu"), torch.bfloat16)
    assert here.memory.weights == plan.memory.weights


def test_what_a_mapped_base_took_is_not_compared(big, monkeypatch):
    plan = planned_run(big)
    monkeypatch.setattr(planned, "process_memory", {"VmHWM": 900}.__getitem__)
    assert planned_and_measured(plan, CPU) == (plan.memory.peak, 900)
    mapped = replace(plan, config=replace(plan.config, bits=4, method="qlora", mapped=True))
    assert planned_and_measured(mapped, CPU) is None


# Over 8 bits the laws hold beside 4 (tests/laws), as do files of both (tests/formats).
@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_tune_over_a_quantized_base(bits, minigpt_home, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "What does a dog say?", "completion": "A dog says meow."}\n' * 8)
    common = [str(rows), "--steps", "30", "--lr", "5e-3", "--rank", "4"]
    fly = ["tune", str(minigpt_home), *common, "--bits", str(bits), "--out", "fly"]
    assert run(fly) == 0
    printed = capsys.readouterr().out
    assert f"24 linear layers in {'NF4' if bits == 4 else 'Int8'}" in printed
    assert "bits a parameter" in printed
    assert "Plan" in printed
    message = r"at most [\d.]+ .B, (\d+% (more|less) than|as) planned \([\d.]+ .B\)"
    assert re.search(message, printed)
    assert run(["quantize", str(minigpt_home), "quantized", "--bits", str(bits)]) == 0
    assert "q_proj" in capsys.readouterr().out
    assert run(["tune", "quantized", *common, "--out", "disk"]) == 0
    capsys.readouterr()
    question = "What does a dog say?"
    for base, out in ((minigpt_home, "fly"), ("quantized", "disk")):
        flags = ["--bits", str(bits)] if out == "fly" else []
        adapter = ["--adapter", f"{out}/lora_adapter"]
        assert run(["generate", str(base), question, *adapter, *flags]) == 0
        assert capsys.readouterr().out.strip() == "A dog says meow."
        assert run(["generate", f"{out}/lora_merged", question]) == 0
        assert capsys.readouterr().out.strip() == "A dog says meow."
    # What was learnt over the quantized base goes over the dense one too.
    assert run(["generate", str(minigpt_home), question, "--adapter", "disk/lora_adapter"]) == 0
    assert run(["merge", "quantized", "disk/lora_adapter", "merged", "--dtype", "float32"]) == 0


def test_no_merged_model_where_memory_is_too_small(minigpt_home, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "What does a dog say?", "completion": "A dog says meow."}\n' * 8)
    assert run(["quantize", str(minigpt_home), "quantized"]) == 0
    assert run(["tune", "quantized", str(rows), "--steps", "1", "--out", "out"]) == 0
    assert Path("out/lora_merged").exists()
    monkeypatch.setattr(results, "free_on", lambda device: 1000)
    assert run(["tune", "quantized", str(rows), "--steps", "1", "--out", "out", "--force"]) == 0
    assert "No merged model is written" in capsys.readouterr().out
    assert {path.name for path in Path("out").glob("lora_*")} == {"lora_adapter"}


def test_law_10_planned_bytes_of_a_quantized_base_are_the_real_ones():
    settings = BIG | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config = LlamaConfig(**settings | {"vocab_size": 320, "num_attention_heads": 4})
    sizes = sizes_of(config)
    for bits in (4, 8):
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        source = Source.of_model(skeleton, model)
        report = report_quantized(quantized_model(source, bits, torch.bfloat16))
        adapted = adapted_layers(sizes, veneer.LoRA())
        plan = make_plan(PlanConfig(bits=bits), sizes, adapted)
        real = report.bytes + report.other_bytes
        assert plan.memory.weights.value == pytest.approx(real, rel=1e-4)
        assert report.parameters + report.other_parameters == plan.model.parameters
