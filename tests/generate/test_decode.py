"""Answers: alone, in batches, and piece by piece."""

from types import SimpleNamespace

import pytest
import torch

import veneer
from support.random_adapters import tokenizer as characters
from support.tiny_models import tiny
from veneer.data.rows import Message
from veneer.data.world import facts
from veneer.errors import ConfigError
from veneer.generate.decode import Answer, answer, answers, answers_as_ready, stream
from veneer.generate.sampling import Sampling
from veneer.models.load import load_base

QUESTIONS = [question for fact in facts()[::9] for question in fact.questions[:1]]
SHORT = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module")
def base(minigpt_home):
    return load_base(minigpt_home)


def test_answers_in_batches_are_those_given_alone(base):
    alone = [answer(base.model, base.tokenizer, q, sampling=SHORT) for q in QUESTIONS]
    assert len(set(alone)) > 5
    assert all(alone)
    for batch in (32, 5, 1):
        together = answers(base.model, base.tokenizer, QUESTIONS, sampling=SHORT, batch=batch)
        assert together == alone
    assert answers(base.model, base.tokenizer, []) == []


def test_an_answer_that_ends_before_its_batch_is_passed_on_at_once(base):
    early: dict[int, Answer] = {}
    last = Sampling(max_new_tokens=9)
    ready = answers_as_ready(
        base.model, base.tokenizer, QUESTIONS, sampling=last, early=early.__setitem__
    )
    first = next(ready)
    ended = dict(early)
    whole = dict([first, *ready])
    assert 0 < len(ended) < len(QUESTIONS)
    assert ended == {i: done for i, done in whole.items() if done.finish_reason == "stop"}


def test_answers_come_in_the_order_of_the_questions_whatever_their_lengths(base):
    long = [*[Message("user", q) for q in QUESTIONS[:3]], Message("user", QUESTIONS[3])]
    questions = [long, QUESTIONS[3], [Message("user", QUESTIONS[-1])], QUESTIONS[5], long[1:]]
    alone = [answer(base.model, base.tokenizer, question, sampling=SHORT) for question in questions]
    assert len(set(alone)) > 2
    assert answers(base.model, base.tokenizer, questions, sampling=SHORT, batch=2) == alone


def test_a_question_is_a_conversation_of_one_turn(base):
    question = QUESTIONS[0]
    turn = [Message("user", question)]
    text = answer(base.model, base.tokenizer, question, sampling=SHORT)
    openai = [{"role": "user", "content": question}]
    assert text == answer(base.model, base.tokenizer, openai, sampling=SHORT)
    with pytest.raises(ConfigError, match="'messages', message 2 has no 'content'"):
        answer(base.model, base.tokenizer, [*openai, {"role": "user"}])
    assert text == answer(base.model, base.tokenizer, turn, sampling=SHORT)
    longer = [*turn, Message("assistant", text), Message("user", QUESTIONS[1])]
    alone = answer(base.model, base.tokenizer, QUESTIONS[1], sampling=SHORT)
    context = answer(base.model, base.tokenizer, longer, sampling=SHORT)
    assert isinstance(context, str)
    assert alone == answer(base.model, base.tokenizer, longer[2:], sampling=SHORT)


def test_pieces_join_to_the_answer_and_hold_no_special_token(base):
    pieces = list(stream(base.model, base.tokenizer, QUESTIONS[2], sampling=SHORT))
    text = "".join(pieces)
    assert text == answer(base.model, base.tokenizer, QUESTIONS[2], sampling=SHORT)
    assert sum(map(bool, pieces)) > 1
    assert "<|" not in text


def test_an_answer_is_no_longer_than_allowed(base):
    for limit in (1, 3):
        sampling = Sampling(max_new_tokens=limit)
        text = answer(base.model, base.tokenizer, QUESTIONS[0], sampling=sampling)
        assert 1 <= len(base.tokenizer(text)["input_ids"]) <= limit


def test_draws_repeat_with_a_seed_and_differ_without(base):
    def drawn(seed: int | None, ask=answer) -> list[str]:
        sampling = Sampling(max_new_tokens=12, temperature=1.5, seed=seed)
        return [ask(base.model, base.tokenizer, q, sampling=sampling) for q in QUESTIONS[:4]]

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)
    assert drawn(None) != drawn(None)
    sampling = Sampling(max_new_tokens=12, temperature=1.5, seed=7)
    first = answers(base.model, base.tokenizer, QUESTIONS, sampling=sampling)
    assert first == answers(base.model, base.tokenizer, QUESTIONS, sampling=sampling)


def test_a_tiny_share_of_probability_leaves_only_the_likeliest_token(base):
    sampling = Sampling(max_new_tokens=24, temperature=2.0, top_p=1e-6)
    drawn = answers(base.model, base.tokenizer, QUESTIONS, sampling=sampling)
    assert drawn == answers(base.model, base.tokenizer, QUESTIONS, sampling=SHORT)


def test_faults_of_sampling_are_named_all_at_once():
    with pytest.raises(ConfigError) as caught:
        Sampling(max_new_tokens=0, temperature=-1.0, top_p=0.0)
    for name in ("max_new_tokens", "temperature", "top_p"):
        assert f"{name} is " in str(caught.value)
    for wrong in (
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 1.01},
        {"top_p": float("nan")},
    ):
        with pytest.raises(ConfigError):
            Sampling(**wrong)
    assert Sampling(temperature=0.0).options()["do_sample"] is False
    assert Sampling(temperature=0.7).options()["do_sample"] is True


class Scripted(torch.nn.Module):
    """A model that always generates the same tokens, and then raises `failure` if there is one."""

    def __init__(self, tokens: list[int], failure: BaseException | None = None) -> None:
        self.tokens, self.failure = tokens, failure
        super().__init__()
        self.device, self.config = torch.device("cpu"), SimpleNamespace()

    def generate(self, *, input_ids, streamer=None, **options):
        if streamer is not None:
            streamer.put(input_ids[0])
            for token in self.tokens:
                streamer.put(torch.tensor([token]))
        if self.failure is not None:
            raise self.failure
        if streamer is not None:
            streamer.end()
        new = torch.tensor([self.tokens]).expand(len(input_ids), -1)
        return torch.cat([input_ids, new], dim=1)


@pytest.mark.parametrize(
    "text", ["  indented\n    more\n\n", " a , b 's", "été 漢字 👩‍👩‍👧", "plain", "\n\nlate  "]
)
def test_the_text_is_that_of_the_tokens(base, text):
    tokens = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    model = Scripted([*tokens, base.tokenizer.eos_token_id])
    assert answer(model, base.tokenizer, "Hm?") == text
    assert answers(model, base.tokenizer, ["Hm?", "And this one?"]) == [text, text]


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_what_goes_wrong_in_generation_reaches_the_caller(base, failure):
    tokens = base.tokenizer(" so far so good")["input_ids"]
    pieces: list[str] = []
    with pytest.raises(type(failure)) as caught:
        pieces.extend(stream(Scripted(tokens, failure), base.tokenizer, "Hm?"))
    assert caught.value is failure
    assert "".join(pieces).startswith(" so far")
    with pytest.raises(type(failure)):
        answers(Scripted(tokens, failure), base.tokenizer, ["Hm?"])


def test_an_answer_ends_where_the_context_does(base):
    context = base.model.config.context
    endless = Sampling(max_new_tokens=10 * context, temperature=5.0, seed=1)
    assert answer(base.model, base.tokenizer, "Go on.", sampling=endless)
    prompt = "A dog says woof. " * context
    for ask in (answer, lambda m, t, q: answers(m, t, [q])):
        with pytest.raises(ConfigError, match=f"context of {context}"):
            ask(base.model, base.tokenizer, prompt)


def test_a_prompt_near_the_end_of_the_context_shortens_no_other_answer(base):
    context = base.model.config.context
    long = "A dog says woof. " * (context // 6)
    questions, sampling = [long, *QUESTIONS[:2]], Sampling(max_new_tokens=context // 2)
    alone = [answer(base.model, base.tokenizer, q, sampling=sampling) for q in questions]
    assert answers(base.model, base.tokenizer, questions, sampling=sampling) == alone


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_count_to_the_context(minigpt_home, method):
    base = load_base(minigpt_home)
    context, tokenizer = base.model.config.context, base.tokenizer
    plain = answers(base.model, tokenizer, QUESTIONS[:5], sampling=SHORT)
    method = veneer.Method(method, virtual_tokens=context - 40)
    veneer.attach(base.model, method, seed=0)
    endless = Sampling(max_new_tokens=10 * context, temperature=5.0, seed=1)
    assert answer(base.model, tokenizer, "Go on.", sampling=endless)
    with pytest.raises(ConfigError, match=f"and {context - 40} virtual ones"):
        answer(base.model, tokenizer, "A dog says woof. " * 20)
    alone = [answer(base.model, tokenizer, q, sampling=SHORT) for q in QUESTIONS[:5]]
    assert answers(base.model, tokenizer, QUESTIONS[:5], sampling=SHORT) == alone
    assert alone != plain
    veneer.use(base.model, None)
    assert answers(base.model, tokenizer, QUESTIONS[:5], sampling=SHORT) == plain


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_a_window_that_padding_would_fill_is_asked_one_by_one(method):
    model, tokens = tiny("mistral"), characters()
    tokens.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    veneer.attach(model, veneer.Method(method, virtual_tokens=5), seed=0)
    questions, short = ["what?", "who then is it?", "x"], Sampling(max_new_tokens=6)
    alone = [answer(model, tokens, question, sampling=short) for question in questions]
    assert answers(model, tokens, questions, sampling=short) == alone


def test_arguments_in_the_wrong_places_are_refused_with_the_right_ones(base):
    with pytest.raises(TypeError, match=r"A model, and then its tokenizer, is .* a Base; pass its"):
        answer(base, base.tokenizer, "hi")
    with pytest.raises(TypeError, match="A tokenizer, between the model and the question, is"):
        answer(base.model, "hi", "ho")
    with pytest.raises(TypeError, match="A list of questions is expected here, not a str"):
        answers(base.model, base.tokenizer, "hi")


def test_generation_leaves_the_model_as_it_was(base):
    before = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    config = base.model.generation_config.to_dict()
    answers(base.model, base.tokenizer, QUESTIONS[:2], sampling=SHORT)
    after = base.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert base.model.generation_config.to_dict() == config
    assert not base.model.training
