"""Reward models: a head of one number beside an adapter, learnt from pairs."""

import copy

import pytest
import torch
from torch.nn import functional as F

import veneer
from support.closeness import assert_gradients_no_further, assert_no_further
from support.pairs import pairs
from support.random_adapters import same, shake, snapshot, tokenizer
from support.runs import of
from support.tiny_models import tiny
from veneer.data.packing import pack
from veneer.errors import AdapterError, ConfigError
from veneer.formats.capture import capture
from veneer.fused.forward import choose_forward
from veneer.models.fingerprint import fingerprint
from veneer.models.score import SCORE_WEIGHT
from veneer.objectives.config import Objective
from veneer.objectives.preferences import criterion_of
from veneer.processes.world import ALONE
from veneer.training.begin import let_train
from veneer.training.events import Step
from veneer.training.ranking import begin_ranking, with_score
from veneer.training.step import counts_of

OBJECTIVE = Objective("reward", reward_centre=0.3)
ROWS = pairs(4)


def reward_model(architecture="llama", **options):
    """Return a model with an adapter and a head that rank, and the rows as it reads them."""
    model = veneer.attach(tiny(architecture), veneer.LoRA(rank=2, targets="all", **options))
    rows, _ = begin_ranking(model, ROWS, [], seed=0)
    return shake(model, size=0.2), rows


def trained(model):
    return {name: w for name, w in model.named_parameters() if w.requires_grad}


def gradients(model):
    return {name: weight.grad for name, weight in trained(model).items()}


def packed_loss(model, rows, batches):
    """Return the loss of all rows, taken in these batches, with its gradients."""
    forward, _ = choose_forward(model, rows)
    forward, criterion = with_score(forward), criterion_of(OBJECTIVE, rows)
    packed = [pack(rows, batch) for batch in batches]
    counts = counts_of(criterion, [(batch, True) for batch in packed], ALONE)
    total = torch.zeros(())
    for batch in packed:
        losses = forward.losses(model, batch, criterion.token_loss(batch, model.device))
        loss = criterion(losses, batch, counts).loss / criterion.divisor(counts)
        loss.backward()
        total += loss.detach()
    return total


def plain_loss(model):
    """Return the loss by the model's own decoder, one row at a time."""
    rewards = []
    for example in ROWS:
        for tokens in (example.tokens[: example.second], example.tokens[example.second :]):
            hidden = model.model(input_ids=torch.tensor([tokens]), use_cache=False)
            rewards.append(model.score(hidden.last_hidden_state[0, -1])[0])
    chosen, rejected = torch.stack(rewards).view(-1, 2).unbind(1)
    return (-F.logsigmoid(chosen - rejected) + 0.3 * (chosen + rejected).square()).mean()


@pytest.mark.parametrize("batches", [[[0, 1, 2, 3]], [[2], [0, 3], [1]]])
def test_loss_and_gradients_are_those_of_rows_one_by_one(batches):
    model, rows = reward_model()
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    ours = packed_loss(model, rows, batches)
    theirs, reference = plain_loss(plain), plain_loss(wide)
    theirs.backward()
    reference.backward()
    assert_no_further(ours, theirs.detach(), reference.detach(), "the loss")
    assert SCORE_WEIGHT in gradients(model)
    assert_gradients_no_further(gradients(model), gradients(plain), gradients(wide))


def test_a_run_learns_the_head_and_leaves_the_base(tmp_path):
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets="all"))
    before = fingerprint(model)
    course = veneer.TrainConfig(steps=6, lr=0.01, save_every=3, keep=2)
    steps = list(
        veneer.train(model, ROWS, course, objective=Objective("reward"), directory=tmp_path)
    )
    losses = [event.loss for event in steps if type(event).__name__ == "Step"]
    assert losses[-1] < losses[0]
    assert fingerprint(model) == before
    whole = capture(model)
    assert whole.task == "SEQ_CLS"
    # From the middle, to the bit.
    import shutil

    shutil.rmtree(tmp_path / sorted(p.name for p in tmp_path.iterdir())[-1])
    again = veneer.attach(tiny("llama"), veneer.LoRA(rank=2, targets="all"))
    list(
        veneer.train(
            *(again, ROWS, course),
            objective=Objective("reward"),
            directory=tmp_path,
            resume=True,
        )
    )
    assert same(snapshot(again), snapshot(model))
    with pytest.raises(AdapterError, match="is a reward model"):
        veneer.merge(model)


@pytest.mark.parametrize("format", ["native", "peft"])
def test_what_is_saved_loads(tmp_path, format):
    model, _ = reward_model()
    veneer.save(model, tmp_path / "saved", format=format)
    other = veneer.load(tiny("llama"), tmp_path / "saved")
    with torch.no_grad():
        tokens = torch.tensor([ROWS[0].tokens])
        one, two = (
            each.score(each.model(input_ids=tokens).last_hidden_state) for each in (model, other)
        )
    assert torch.equal(one, two)
    veneer.detach(other)
    assert not hasattr(other, "score")
    assert same(snapshot(other), snapshot(tiny("llama")))


@pytest.mark.slow
@pytest.mark.parametrize("centre", [None, 0.3])
def test_losses_and_gradients_are_trls(tmp_path, centre):
    """TRL's own trainer, over transformers' classifier with the file that we wrote as PEFT's."""
    import peft
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    model, rows = reward_model()
    veneer.save(model, tmp_path / "peft", format="peft")
    base = tiny("llama")
    base.config.num_labels, base.config.pad_token_id = 1, 0
    made = AutoModelForSequenceClassification.from_config(base.config, dtype=torch.float32)
    made.model.load_state_dict(base.model.state_dict())

    def loss_of(wide):
        own = copy.deepcopy(made).to(torch.float64 if wide else torch.float32)
        adapted = peft.PeftModel.from_pretrained(
            own, tmp_path / "peft", is_trainable=True, autocast_adapter_dtype=False
        )
        adapted = adapted.double() if wide else adapted
        trainer = RewardTrainer(
            model=adapted,
            args=RewardConfig(
                output_dir=str(tmp_path / "trl"),
                center_rewards_coefficient=centre,
                use_cpu=True,
                bf16=False,
                report_to=[],
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=tokenizer(),
        )
        batch = trainer.data_collator(
            [
                {"chosen_ids": row.tokens[: row.second], "rejected_ids": row.tokens[row.second :]}
                for row in ROWS
            ]
        )
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        grads = {}
        for name, weight in trainer.model.named_parameters():
            if weight.requires_grad:
                name = name.removeprefix("base_model.model.").replace(".modules_to_save", "")
                name = name.replace("lora_A.default.weight", "adapters.default.lora_A")
                name = name.replace("lora_B.default.weight", "adapters.default.lora_B")
                grads[name.replace("score.default.", "score.")] = weight.grad
        return loss.detach(), grads

    global OBJECTIVE
    before, OBJECTIVE = OBJECTIVE, Objective("reward", reward_centre=centre or 0.0)
    try:
        ours = packed_loss(model, rows, [[0, 1, 2, 3]])
    finally:
        OBJECTIVE = before
    (theirs, their_grads), (reference, wide_grads) = loss_of(False), loss_of(True)
    assert_no_further(ours, theirs, reference, "the loss")
    assert_gradients_no_further(gradients(model), their_grads, wide_grads)


def test_only_an_adapter_of_low_rank_ranks():
    with pytest.raises(ConfigError, match="one adapter of low rank"):
        begin_ranking(tiny("llama"), ROWS, [], seed=0)


@pytest.mark.slow
def test_a_reward_model_judges_samples_and_win_rates(minigpt_home, tmp_path, capsys):
    import json

    from veneer.cli.app import run
    from veneer.quant.stack import quantized_weights
    from veneer.rewards.judged import Answered
    from veneer.training.reward_model import ModelReward

    pairs_file, out = tmp_path / "pairs.jsonl", tmp_path / "judge"
    rows = [
        {"prompt": f"What is {i}?", "chosen": "It is a number.", "rejected": "I am sorry."}
        for i in range(24)
    ]
    pairs_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["tune", minigpt_home, pairs_file, "--objective", "reward", "--out", out]
    command += ["--steps", 12, "--lr", 0.003, "--dtype", "float32", "--eval-rows", 4, "--bits", 4]
    assert run([*map(str, command)]) == 0
    printed = capsys.readouterr()
    assert "is a reward model" in " ".join((printed.out + printed.err).split())
    judge = ModelReward(str(out))
    asked = [{"role": "user", "content": "What is 90?"}]
    good, bad = (judge(Answered(text, asked)) for text in ("It is a number.", "I am sorry."))
    assert good > bad
    base, *_ = judge._loaded
    assert quantized_weights(base.model)  # as in training
    judge.close()
    prompts, runs = tmp_path / "prompts.jsonl", tmp_path / "samples"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    command = ["tune", minigpt_home, prompts, "--objective", "grpo", "--out", runs]
    command += ["--reward", f"model:{out}", "--steps", 1, "--prompts-per-step", 2]
    command += ["--group-size", 2, "--max-new-tokens", 6, "--dtype", "float32"]
    assert run([*map(str, command)]) == 0
    drawn = [json.loads(line) for line in (runs / "samples.jsonl").read_text().splitlines()]
    assert len(drawn) == 4
    command = ["evaluate", minigpt_home, "--adapter", runs, "--against", "base"]
    command += ["--prompts", prompts, "--judge", f"model:{out}", "--max-new-tokens", 6, "--json"]
    capsys.readouterr()
    assert run([*map(str, command)]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["wins"] + results["ties"] + results["losses"] == 24


def test_a_job_among_others_learns_what_a_run_alone_does():
    course = veneer.TrainConfig(lr=0.01, steps=2, tokens_per_step=40, warmup=0)
    objectives = {
        "judge": Objective("reward"),
        "other": Objective("reward"),
        "dpo": Objective("dpo"),
    }

    def with_adapters(names):
        model = tiny("llama")
        for number, name in enumerate(names):
            veneer.attach(model, veneer.LoRA(rank=2), name=name, seed=number)
        veneer.use(model, None)
        return model

    together, alone = with_adapters(objectives), with_adapters(objectives)
    jobs = {
        name: veneer.Job(ROWS, course, objective, held_out=ROWS[:2])
        for name, objective in objectives.items()
    }
    events = list(veneer.train_many(together, jobs))
    for name, objective in objectives.items():
        veneer.use(alone, name)
        let_train(alone, name)
        expected = of(
            Step, list(veneer.train(alone, ROWS, course, objective=objective, held_out=ROWS[:2]))
        )
        alone.requires_grad_(False)
        steps = [event for own, event in events if own == name and isinstance(event, Step)]
        assert len(steps) == len(expected) == 2
        for ours, theirs in zip(steps, expected, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
            assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-3, abs=1e-4)
    veneer.use(together, "dpo")
    assert SCORE_WEIGHT in together.state_dict()
    assert SCORE_WEIGHT not in veneer.merge(together).state_dict()  # which others could not load


def test_what_is_no_reward_model_cannot_judge(tmp_path):
    from veneer.rewards.named import reward_named
    from veneer.training.reward_model import ModelReward

    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=2))
    veneer.save(model, tmp_path / "plain")
    with pytest.raises(ConfigError, match="is no reward model"):
        reward_named(f"model:{tmp_path / 'plain'}", seconds=1, model=ModelReward)
    ranking, _ = reward_model()
    veneer.save(ranking, tmp_path / "judge")
    with pytest.raises(ConfigError, match="without its base"):
        reward_named(f"model:{tmp_path / 'judge'}", seconds=1, model=ModelReward)
    with pytest.raises(ConfigError, match="cannot judge"):
        reward_named("model:nowhere", seconds=1, model=ModelReward)
