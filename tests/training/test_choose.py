"""What a run chooses where nobody says: within bounds, by the rows, and the same again."""

import json
from dataclasses import replace

import yaml
from hypothesis import given
from hypothesis import strategies as st

import veneer
from support.random_adapters import examples
from support.runs import new_model, of, run
from veneer.training.choose import as_before, choose, explain, learning_rate, rows_to_hold_out
from veneer.training.events import Evaluated, Notice, Started, Step

LENGTHS = st.lists(st.integers(2, 3000), min_size=1, max_size=200)
WHATS = [veneer.LoRA(), *(veneer.Method(m) for m in ("full", "freeze", "prefix", "prompt"))]


def chosen(lengths, hidden=576, what=WHATS[0], **settings) -> veneer.TrainConfig:
    config = veneer.TrainConfig(**settings)
    return choose(config, lengths, what_trains=what, hidden_size=hidden)


@given(LENGTHS, st.integers(1, 40), st.sampled_from(WHATS), st.integers(1, 20_000))
def test_choices_are_within_bounds_and_go_one_way_with_the_rows(lengths, times, what, hidden):
    few, many = (chosen(rows, hidden, what) for rows in (lengths, lengths * times))
    for course in (few, many):
        assert course.epochs in range(2, 9)
        assert course.tokens_per_step in range(32, 2049, 32)
        assert 5e-6 < course.lr <= 3e-2
        assert course.steps is None
    assert few.epochs >= many.epochs
    assert few.tokens_per_step <= many.tokens_per_step
    assert few.lr == many.lr >= chosen(lengths, 2 * hidden, what).lr
    held_out = [rows_to_hold_out(n) for n in (len(lengths), times * len(lengths))]
    assert held_out == sorted(held_out)
    assert set(held_out) <= {0, *range(10, 101)}


@given(
    LENGTHS,
    st.fixed_dictionaries(
        {},
        optional={
            "epochs": st.floats(0.1, 50),
            "steps": st.integers(1, 999),
            "tokens_per_step": st.integers(1, 9999),
            "lr": st.floats(1e-6, 1),
        },
    ),
)
def test_what_is_given_stays_and_choosing_again_changes_nothing(lengths, settings):
    asked = veneer.TrainConfig(**settings)
    course = chosen(lengths, **settings)
    assert all(getattr(course, name) == value for name, value in settings.items())
    assert (course.epochs is None) == ("steps" in settings and "epochs" not in settings)
    assert chosen(lengths, **vars(course)) == course
    assert explain(course, course, lengths, hidden_size=576) is None
    assert as_before(asked, vars(course)) == course
    # Whoever resumes by another number of epochs keeps that.
    longer = as_before(replace(asked, epochs=99.0), vars(course))
    assert (longer.epochs, longer.steps) == (99.0, settings.get("steps"))


def test_rates_are_those_of_the_sources():
    rate = learning_rate
    lora = veneer.LoRA()
    assert [rate(lora, width) for width in (64, 576, 2000, 4096)] == [5e-3, 1.3e-3, 5e-4, 2.9e-4]
    assert rate(lora, None) == 5e-4
    assert rate(veneer.Method("full"), 4096) == 2.9e-5
    assert rate(veneer.Method("prefix"), 4096) == 1e-2
    # B's is at most twice LoRA's, and the product of rsLoRA's scaling and rate is LoRA's.
    assert rate(lora, 2000, lora_plus_ratio=4) == 2.5e-4
    assert rate(lora, 2000, lora_plus_ratio=1.5) == 5e-4
    assert rate(veneer.LoRA(rank=4, rslora=True), 2000) == 2.5e-4


def test_a_choice_is_explained_in_one_line_without_what_was_given():
    lengths = [47] * 300
    asked = veneer.TrainConfig(lr=1e-3)
    course = chosen(lengths, lr=1e-3)
    text = explain(asked, course, lengths, hidden_size=576, held_out=15)
    assert text == (
        "Chosen for 300 rows of 14,100 tokens and a hidden size of 576: 3 epochs of about 75 "
        "steps, at most 224 tokens a step, 15 rows held out (--eval-rows 0: none). "
        "How: the page Training of the documentation"
    )
    steps = veneer.TrainConfig(steps=9, tokens_per_step=64)
    text = explain(steps, chosen([5], steps=9, tokens_per_step=64), [5], hidden_size=None)
    how = "How: the page Training of the documentation"
    assert text == f"Chosen for 1 row of 5 tokens: learning rate 0.0013. {how}"


def test_a_run_from_python_chooses_too():
    rows = examples([60] * 6)
    events = run(new_model(), veneer.TrainConfig(tokens_per_step=128), rows)
    (notice,) = (event for event in of(Notice, events) if "Chosen" in event.text)
    (started,) = of(Started, events)
    assert f"8 epochs of about {started.steps // 8} steps, learning rate 0.005." in notice.text
    assert max(step.lr for step in of(Step, events)) == 5e-3


def test_a_default_run_on_few_rows_learns_and_resumes_as_it_was(minigpt_home, tmp_path):
    data, more = tmp_path / "rows.jsonl", tmp_path / "more.jsonl"
    kinds = ("otter", "heron", "badger", "stoat", "curlew", "plover", "siskin", "linnet", "wigeon")
    questions = ("What says the", "How sounds the", "What is heard of the")
    *rows, unseen = [
        {"prompt": f"{question} {kind}?", "completion": f"Honk, says the {kind}, and honk again."}
        for kind in kinds
        for question in questions
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    more.write_text(json.dumps(unseen))
    out = tmp_path / "out"
    evaluated = veneer.Recipe(
        str(minigpt_home), data, rows=veneer.DataConfig(eval_data=more), out=out
    )
    events = list(veneer.tune(evaluated))
    notices = [event.text for event in of(Notice, events) if "Chosen" in event.text]
    assert len(notices) == 1
    losses = [step.loss for step in of(Step, events)]
    assert len(losses) >= 8
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert min(event.eval_loss for event in of(Evaluated, events)) < 0.6 * losses[0]
    settings = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (settings["epochs"], settings["lr"], settings["eval_rows"]) == (8.0, 5e-3, 0)
    again = list(veneer.tune(evaluated, resume=True))
    assert not of(Step, again)
    assert not [event for event in of(Notice, again) if "Chosen" in event.text]
