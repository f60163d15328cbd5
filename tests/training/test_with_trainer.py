"""transformers' Trainer with an adapted model: what trains, what is written, what resumes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import veneer
from support.closeness import assert_no_further
from support.random_adapters import (
    base_tensors,
    logits,
    same,
    snapshot,
    targets_named,
    tokenizer,
    trained_weights,
)
from support.tiny_models import tiny
from support.trainers import STEPS, batches, sft_losses, trainer, trainer_losses
from veneer.training.with_trainer import ADAPTER

BATCHES = batches()


def new_model(architecture: str = "llama", targets: str = "everything", **options: Any) -> Any:
    model = tiny(architecture)
    names = targets_named(model, targets)
    if architecture == "mixtral":
        names = ["attention"]
    return veneer.attach(model, veneer.LoRA(rank=2, targets=names, **options), seed=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_resumed_run_equals_the_undisturbed_one(architecture):
    whole = new_model(architecture)
    trainer(whole, BATCHES, save_strategy="steps", save_steps=3).train()
    again = new_model(architecture)
    trainer(again, BATCHES).train(resume_from_checkpoint="trained/checkpoint-3")
    assert same(trained_weights(again), trained_weights(whole))
    assert torch.equal(logits(again.eval()), logits(whole.eval()))


def test_the_best_checkpoint_comes_back():
    model = new_model(dora=True)
    losses = [2.0, 1.0, 3.0]
    run = trainer(
        model,
        BATCHES,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss",
        load_best_model_at_end=True,
    )
    weights: list[dict[str, torch.Tensor]] = []

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
        weights.append(trained_weights(model))
        metrics = {"eval_loss": losses[len(weights) - 1]}
        run.callback_handler.on_evaluate(run.args, run.state, run.control, metrics)
        return metrics

    run.evaluate = evaluate
    run.train()
    assert not same(weights[1], weights[2])
    assert same(trained_weights(model), weights[1])


@pytest.mark.parametrize("form", ["native", "peft"])
def test_the_adapter_lies_in_each_checkpoint_and_beside_them(form):
    model = new_model()
    adapter = veneer.SaveAdapter(format=form)
    run = trainer(model, BATCHES, callbacks=[adapter], save_strategy="steps", save_steps=2)
    run.train()
    assert run.state.global_step == STEPS
    outputs = {}
    for place in ("checkpoint-2", "checkpoint-4", "."):
        fresh = tiny("llama")
        veneer.load(fresh, Path("trained", place, ADAPTER))
        outputs[place] = logits(fresh)
    assert torch.equal(outputs["."], logits(model.eval()))
    assert not torch.equal(outputs["checkpoint-2"], outputs["checkpoint-4"])


def test_without_the_callback_the_error_names_it_and_a_way_that_works():
    model = new_model()
    run = trainer(model, BATCHES)
    run.train()
    run.save_model("whole")
    with pytest.raises(
        veneer.AdapterError, match=r"callbacks=\[veneer.SaveAdapter\(\)\]"
    ) as refusal:
        veneer.load(tiny("llama"), "whole")
    assert "load_file('whole/model.safetensors'), strict=False)" in str(refusal.value)
    again = new_model()
    again.load_state_dict(load_file("whole/model.safetensors"), strict=False)
    assert same(trained_weights(again), trained_weights(model))
    base = veneer.load_base("whole", tokenizer=tokenizer())
    assert "veneer.SaveAdapter" in base.notices[-1]


class TestCheckpointsOfTheAdapterAlone:
    @staticmethod
    def run(model: Any, **options: Any) -> Any:
        """Return a Trainer that saves after three steps, with the callback."""
        options = {"save_strategy": "steps", "save_steps": 3} | options
        return trainer(model, BATCHES, callbacks=[veneer.SaveAdapter()], **options)

    @pytest.mark.parametrize(
        ("architecture", "options"),
        [
            ("llama", {"dora": True, "dropout": 0.3}),
            ("mixtral", {"init": "pissa"}),
        ],
    )
    def test_they_hold_no_tensor_of_the_base_and_resume(self, architecture, options, caplog):
        whole = new_model(architecture, **options)
        undisturbed = self.run(whole)
        undisturbed.train()
        written = load_file("trained/checkpoint-3/model.safetensors")
        assert not written.keys() & base_tensors(tiny(architecture)).keys()
        assert {*trained_weights(whole)} <= {*written}
        assert not Path("trained/checkpoint-3/config.json").exists()
        again = new_model(architecture, **options)
        resumed = self.run(again, save_strategy="no")
        resumed.train(resume_from_checkpoint="trained/checkpoint-3")
        assert resumed.losses == undisturbed.losses[3:]
        assert same(trained_weights(again), trained_weights(whole))
        assert "missing keys" not in caplog.text
        plain = veneer.merge(whole)
        plain.save_pretrained("merged")
        assert same(snapshot(AutoModelForCausalLM.from_pretrained("merged")), snapshot(plain))

    def test_a_classifier_that_trains_beside_the_adapter_is_in_them(self):
        def model() -> Any:
            model = veneer.attach(tiny("bert"), veneer.LoRA(rank=2, targets="all"), seed=0)
            model.classifier.requires_grad_(True)
            return model

        rows = [{**batch, "labels": batch["labels"][:, -1] % 2} for batch in BATCHES]
        runs = []
        for resume in (None, "trained/checkpoint-3"):
            runs.append(
                trainer(
                    model(),
                    rows,
                    callbacks=[veneer.SaveAdapter()],
                    save_strategy="no" if resume else "steps",
                    save_steps=3,
                )
            )
            with pytest.warns(veneer.VeneerWarning, match="classifier"):
                runs[-1].train(resume_from_checkpoint=resume)
        assert runs[1].losses == runs[0].losses[3:]

    def test_a_full_fine_tuning_keeps_whole_models(self):
        model = tiny("llama")
        veneer.attach(model, veneer.Method(method="full"))
        run = self.run(model)
        run.train()
        read = AutoModelForCausalLM.from_pretrained("trained/checkpoint-5")
        assert same(snapshot(read), snapshot(model))


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
def test_what_trainer_writes_is_the_base_with_the_adapter_beside_it(architecture):
    model = new_model(architecture)
    run = trainer(model, BATCHES)
    run.train()
    run.save_model("written")
    read = AutoModelForCausalLM.from_pretrained("written")
    assert same(snapshot(read), snapshot(tiny(architecture)))


# TRL checkpoints llama below; here are those whose layers are not all a decoder's.
@pytest.mark.parametrize(
    "architecture",
    ["t5", *(pytest.param(each, marks=pytest.mark.slow) for each in ("llama", "mamba"))],
)
def test_gradient_checkpointing_changes_nothing(architecture):
    theirs = trainer_losses(new_model(architecture, "all"), BATCHES)
    reference = trainer_losses(new_model(architecture, "all").double(), BATCHES)
    for use_reentrant in (False, True):
        ours = trainer_losses(
            new_model(architecture, "all"),
            BATCHES,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        )
        assert_no_further(*map(torch.tensor, (ours, theirs, reference)), f"{use_reentrant}")


def test_accumulated_batches_equal_the_large_one():
    large, small, reference = new_model(), new_model(), new_model().double()
    batch = dict(BATCHES[0])
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]
    # A step of plain descent is as large as its gradient; AdamW's first would be as large as the
    # learning rate, in a direction that rounding may decide.
    options: dict[str, Any] = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0}
    trainer(large, [batch], **options).train()
    trainer(reference, [batch], **options).train()
    trainer(small, rows, gradient_accumulation_steps=len(rows), **options).train()
    ours, theirs, wide = map(trained_weights, (small, large, reference))
    for name, weight in ours.items():
        assert_no_further(weight, theirs[name], wide[name], name)
    assert not same(ours, trained_weights(new_model()))


@pytest.mark.parametrize("by", ["trainer", "sft"])
def test_merged_after_a_trainer_replaced_the_models_forward(by):
    model = new_model("llama", "all")
    if by == "trainer":
        trainer_losses(model, BATCHES, bf16=True)
    else:  # in its own defaults: bfloat16, gradient checkpointing, and logits by a head of its own
        rows = [row.tolist() for row in BATCHES[0]["input_ids"]] * 8
        losses = sft_losses(model, rows, per_device_train_batch_size=4)
        assert losses[-1] < losses[0]
    assert "forward" in model.__dict__
    plain = veneer.merge(model)
    assert "forward" not in plain.__dict__
    before = copy.deepcopy(logits(plain))
    veneer.use(model, None)
    assert torch.equal(logits(plain), before)
    assert not torch.equal(logits(tiny("llama")), before)


def test_saving_warns_of_what_trains_beside_the_adapter():
    model = tiny("bert")
    veneer.attach(model, veneer.LoRA(rank=2), seed=0)
    veneer.save(model, "silent")
    model.classifier.requires_grad_(True)
    with pytest.warns(veneer.VeneerWarning, match="classifier.bias, classifier.weight train too"):
        veneer.save(model, "warned")


def test_an_adapter_over_another_classifier_is_refused():
    model = tiny("bert")
    veneer.attach(model, veneer.LoRA(rank=2), seed=0)
    veneer.save(model, "adapter")
    other = tiny("bert")
    torch.nn.init.normal_(other.classifier.weight)
    with pytest.raises(veneer.AdapterError, match="another base"):
        veneer.load(other, "adapter")
