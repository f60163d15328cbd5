"""A run on samples learns what is rewarded, and goes on as if it had never stopped."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import islice

import pytest
import torch

import veneer
from support.every_architecture import small_quantized
from support.prompts import prompts
from support.random_adapters import tokenizer, trained_weights
from support.runs import new_model, of
from veneer.data.problems import Located, Place
from veneer.data.questions import Question
from veneer.data.rows import Message
from veneer.errors import ConfigError, DataError, ModelError, TrainingError
from veneer.generate.samples import Sample
from veneer.kernels.transfer import OnTheWay
from veneer.objectives.config import Objective
from veneer.objectives.policy_config import OnPolicy
from veneer.rewards.graders import Graded, grader_of
from veneer.rewards.judged import RewardFault, Weighted
from veneer.run_directory import RunDirectory
from veneer.training.events import Evaluated, Notice, Skipped, Started, Step, Stopped, Trained
from veneer.training.on_policy.page import SampleLog, page_of
from veneer.training.on_policy.prompts import encoded
from veneer.training.on_policy.rollout import Roller
from veneer.training.on_policy.run import train_on_policy
from veneer.training.step import learn as make_update

COURSE = veneer.TrainConfig(lr=0.03, steps=4, warmup=0, tokens_per_batch=60)
SHORT = OnPolicy(group_size=4, prompts_per_step=2, max_new_tokens=6)
GRPO, RLOO = Objective("grpo"), Objective("rloo")


class Vowels:
    """How many of an answer's characters are vowels."""

    name = "vowels"

    def __call__(self, answer):
        return sum(c in "aeiou" for c in answer.text) / max(1, len(answer.text))

    def close(self):
        pass


class Failing(Vowels):
    """A reward that fails for some answers."""

    name = "failing"

    def __call__(self, answer):
        if len(answer.text) % 3 == 1:
            raise RewardFault("raised", "ValueError: no.")
        return math.nan if len(answer.text) % 3 == 2 else 1.0


def test_a_date_in_a_row_that_graders_read_is_of_the_prompts_identity():
    texts = {"input": "{{ sample.output_text }}", "reference": "{{ item.day }}"}
    grader = grader_of({"type": "string_check", "name": "day", "operation": "eq", **texts})

    def identity(day):
        asked = Question((Message("user", "Which day?"),), (), item={"day": day})
        row, sizes = Located(asked, Place("days.parquet", 1)), {"context": 60, "max_new_tokens": 6}
        return encoded([row], tokenizer(), graded=[Graded(grader)], **sizes).identity

    assert identity(date(2026, 1, 1)) != identity(date(2026, 1, 2))


def run(model, course=COURSE, config=SHORT, *, objective=GRPO, reward=Vowels, out=None, **options):
    return train_on_policy(
        *(model, tokenizer(), prompts(), course),
        objective=objective,
        on_policy=config,
        rewards=[Weighted(reward())],
        directory=None if out is None else RunDirectory(out),
        **options,
    )


def test_evaluations_draw_by_the_same_random_numbers_each_time():
    course = replace(COURSE, lr=1e-12, eval_every=1)
    config = replace(SHORT, eval_answers=8)
    events = list(run(new_model(), course, config, held_out=prompts(("Other", "Else"))))
    evaluations = of(Evaluated, events)
    assert [event.step for event in evaluations] == [0, 1, 2, 3, 4]
    assert evaluations[0].metrics["reward"] > 0
    assert all(event.metrics == evaluations[0].metrics for event in evaluations)
    assert all(event.eval_loss == -event.metrics["reward"] for event in evaluations)
    assert of(Trained, events)[0].weights_of == 0  # none was better


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        pytest.param("nf4", {}, marks=pytest.mark.slow),
        pytest.param("llama", {"dora": True}, marks=pytest.mark.slow),
        pytest.param("llama", {"init": "pissa"}, marks=pytest.mark.slow),
        pytest.param("gpt2", {}, marks=pytest.mark.slow),
        pytest.param("mixtral", {}, marks=pytest.mark.slow),
        pytest.param("mamba", {}, marks=pytest.mark.slow),
    ],
)
def test_any_base_and_adapter_learns_from_samples(architecture, options):
    """Sampler and trainer agree, also where the weights are quantized, and after they changed."""
    if architecture == "nf4":
        config = veneer.LoRA(rank=2, targets="all")
        model = veneer.attach(small_quantized("llama", 4, dtype=torch.float32), config)
    else:
        model = new_model(architecture, **options)
    if architecture == "mamba":
        with pytest.raises(
            ModelError, match="No samples can be drawn from this model: Only models"
        ):
            list(run(model, course=replace(COURSE, steps=2)))
        return
    steps = of(Step, list(run(model, course=replace(COURSE, steps=2))))
    assert [step.step for step in steps] == [1, 2]
    assert all(step.metrics["largest_sampler_gap"] < 1e-3 for step in steps)
    assert all(math.isfinite(step.loss) for step in steps)


@pytest.mark.parametrize("objective", [GRPO, pytest.param(RLOO, marks=pytest.mark.slow)])
def test_what_is_rewarded_is_said_more_often(objective):
    config = OnPolicy(group_size=8, prompts_per_step=3, max_new_tokens=6, updates=2)
    course = veneer.TrainConfig(lr=0.05, steps=10, warmup=0, schedule="constant")
    steps = of(Step, list(run(new_model(), course, config, objective=objective)))
    rewards = [step.metrics["reward"] for step in steps]
    assert sum(rewards[-3:]) > 1.5 * sum(rewards[:3])
    assert all(step.metrics["largest_sampler_gap"] < 1e-3 for step in steps)
    assert all(0 < step.metrics["entropy"] < math.log(96) for step in steps)
    assert any(step.metrics["clipped"] > 0 for step in steps)


def test_the_adapter_alone_changes_and_the_base_is_the_reference(tmp_path):
    model = new_model()
    before = {n: w.clone() for n, w in model.named_parameters() if not w.requires_grad}
    config = OnPolicy(group_size=4, prompts_per_step=2, max_new_tokens=6, kl_weight=0.1)
    steps = of(Step, list(run(model, config=config)))
    assert steps[0].metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[-1].metrics["kl"] > steps[0].metrics["kl"]
    assert all(torch.equal(w, before[n]) for n, w in model.named_parameters() if n in before)


def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(tmp_path):
    course = replace(COURSE, save_every=1, steps=3)
    config = replace(SHORT, updates=2)
    whole, resumed = new_model(), new_model()
    events = list(run(whole, course, config, out=tmp_path / "whole"))
    stop = iter([False, True])
    first = list(
        run(new_model(), course, config, out=tmp_path / "cut", should_stop=partial(next, stop))
    )
    assert of(Stopped, first)[0].step == 2
    with (tmp_path / "cut" / "samples.jsonl").open("a") as file:
        file.write('{"step": 3}\n')  # as of a step that was killed
    rest = list(run(resumed, course, config, out=tmp_path / "cut", resume=True))
    expected, own = trained_weights(whole), trained_weights(resumed)
    assert all(torch.equal(own[name], weight) for name, weight in expected.items())
    both = [*of(Step, first), *of(Step, rest)]
    timed = ("sample_tokens_per_second",)

    def numbers(step):
        return {name: x for name, x in step.metrics.items() if name not in timed}

    assert list(map(numbers, both)) == list(map(numbers, of(Step, events)))
    lines = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "cut")]
    assert lines[0] == lines[1]


class Rare(Vowels):
    """A reward that few answers have."""

    name = "rare"

    def __call__(self, answer):
        return float(answer.text[:1] in "abcd")


class Same(Vowels):
    """A reward that all answers have."""

    name = "same"

    def __call__(self, answer):
        return 1.0


@pytest.mark.parametrize("reward", [Rare, Same])
def test_groups_that_teach_nothing_are_drawn_again_up_to_a_bound(reward):
    course = replace(COURSE, steps=1)
    config = replace(SHORT, prompts_per_step=3)
    (once,) = of(Step, list(run(new_model(), course, config, reward=reward)))
    config = replace(config, resample=4)
    (step,) = of(Step, list(run(new_model(), course, config, reward=reward)))
    equal = round(3 * once.metrics["equal_groups"])
    assert "resampled_groups" not in once.metrics
    if reward is Same:
        assert (equal, step.metrics["resampled_groups"]) == (3, 3 * 4)
        assert step.metrics["equal_groups"] == 1
    else:
        assert 0 < equal <= step.metrics["resampled_groups"] < 3 * 4
        assert step.metrics["equal_groups"] < once.metrics["equal_groups"]


def test_rewards_fall_with_length_and_with_the_distance_from_the_base():
    config = replace(SHORT, overlong_margin=2, kl_weight=0.5)
    roller = Roller(*(None, None, None, ()), config, of_answers=True, seed=0)
    samples = [Sample([7] * 6, [-1.0] * 6), Sample([7] * 2, [-0.5] * 2)]
    reference = [[-2.0] * 6, [-0.5] * 2]
    assert roller._shaped([1.0, 1.0], samples, reference).tolist() == [1 - 1 - 0.5 * 6, 1]
    of_tokens = replace(roller, of_answers=False)  # whose loss has the distance
    assert of_tokens._shaped([1.0, 1.0], samples, reference).tolist() == [1 - 1, 1]


def test_samples_and_their_rewards_are_written(tmp_path):
    list(run(new_model(), out=tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 3 * 4  # in two epochs of three prompts
    assert {line["step"] for line in lines} == {1, 2, 3, 4}
    assert {line["row"] for line in lines} <= {f"prompts.jsonl:{i}" for i in (1, 2, 3)}
    for line in lines:
        assert line["reward"] == line["rewards"]["vowels"]
    page = (tmp_path / "samples.html").read_text()
    assert "24 samples in 4 steps" in page


def test_a_line_that_was_cut_off_in_a_character_is_left_out(tmp_path):
    log, lines = SampleLog(RunDirectory(tmp_path)), [{"step": 1}, {"step": 2}]
    log.add(lines)
    with log.directory.samples.open("ab") as file:
        file.write('{"step": 3, "answer": "é'.encode()[:-1])
    for step in (2, 1, 0):
        log.begin(step)
        kept = log.directory.samples.read_text().splitlines()
        assert list(map(json.loads, kept)) == lines[:step]


def test_a_base_that_changes_meanwhile_ends_the_run():
    model = new_model()
    events = run(model, course=replace(COURSE, steps=1))
    while not isinstance(next(events), Started):
        pass
    model.get_input_embeddings().weight.data[0, 0] += 1
    with pytest.raises(TrainingError, match="The base is frozen, but"):
        list(events)


def test_an_update_that_is_not_finite_is_reported_whichever_it_is(monkeypatch):
    made = []

    def learn(model, forward, asked, **options):
        make_update(model, forward, asked, **options)
        if not made:
            sums = OnTheWay(torch.zeros(5), torch.tensor(False))
            asked._answer[:] = [replace(asked.learning, _sums_and_finite=sums)]
        made.append(asked)

    monkeypatch.setattr("veneer.training.on_policy.run.learn", learn)
    events = list(run(new_model(), replace(COURSE, steps=2), replace(SHORT, updates=2)))
    assert len(made) == 4
    assert [event.step for event in of(Skipped, events)] == [1]
    assert [event.step for event in of(Step, events)] == [2]


def test_nothing_in_an_answer_is_markup():
    line = {"step": 1, "row": "<b>", "prompt": "<i>", "answer": "<script>", "ended": True}
    line |= {"reward": None, "advantage": 0.0, "rewards": {"<u>": None}}
    page = page_of([line], {1: 1})
    for text in ("<b>", "<i>", "<script>", "<u>"):
        assert text not in page


def test_a_reward_that_fails_is_named_and_the_run_goes_on():
    events = list(run(new_model(), reward=Failing))
    (notice,) = [e.text for e in of(Notice, events) if "reward failing" in e.text][:1]
    assert "The reward failing" in notice
    assert "prompts.jsonl:" in notice
    assert all(step.metrics["reward_faults"] > 0 for step in of(Step, events))
    assert all(math.isfinite(step.loss) for step in of(Step, events))


def test_or_stops_where_that_is_asked(tmp_path):
    config = replace(SHORT, on_reward_fault="stop")
    with pytest.raises(TrainingError, match=r"The reward failing .*prompts\.jsonl.*--resume"):
        list(run(new_model(), config=config, reward=Failing, out=tmp_path))


def test_what_cannot_be_trained_on_samples_is_refused():
    model = new_model(invocation=(5,))
    with pytest.raises(ConfigError, match="acts from an invocation on draws no samples"):
        next(run(model))
    with pytest.raises(ConfigError, match="on_spike skip is for answers that are given"):
        next(run(new_model(), replace(COURSE, on_spike="skip")))
    with pytest.raises(ConfigError, match="one adapter of low rank has to act"):
        next(
            run(new_model().requires_grad_(True), config=SHORT)
            if veneer.use(model, None)
            else run(model)
        )


def test_prompts_that_cannot_be_used_are_listed_at_once():
    with pytest.raises(
        DataError, match=r"(?s)3 of 3 prompts.*no room for an answer of 50"
    ) as error:
        prompts(("a" * 20, "b" * 30, ""), context=60, max_new_tokens=50)
    assert len(error.value.problems) == 3


@pytest.mark.slow
def test_a_run_goes_through_all_prompts_once_an_epoch():
    course = veneer.TrainConfig(lr=0.01, epochs=2, warmup=0)
    config = replace(SHORT, prompts_per_step=1)
    assert len(of(Step, list(run(new_model(), course, config)))) == 6


@pytest.mark.slow
def test_sampling_waits_for_nobody():
    """A run can be left after any event."""
    model = new_model()
    assert len(list(islice(run(model), 3))) == 3
    assert not model.training
