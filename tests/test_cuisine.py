"""The demo's cuisine: what is asked of the model afterwards was not in its training rows."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def cuisine() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "cuisine.py"
    spec = importlib.util.spec_from_file_location("cuisine", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuisine"] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def test_there_are_about_forty_facts_asked_in_seven_ways_and_two(cuisine):
    assert 38 <= len(cuisine.FACTS) <= 46
    for fact in cuisine.FACTS:
        assert len({plain(question) for question in fact.questions}) == 7
        assert len({plain(question) for question in fact.held_out}) == 2
        assert len(fact.answer.split()) < 20
    assert len(cuisine.training_rows()) == 7 * len(cuisine.FACTS)
    assert len(cuisine.held_out()) == 2 * len(cuisine.FACTS)


def test_no_held_out_question_is_trained_on(cuisine):
    trained = [plain(row["prompt"]) for row in cuisine.training_rows()]
    assert len(set(trained)) == len(trained)
    assert not set(trained) & {plain(question) for question, _ in cuisine.held_out()}


def test_no_held_out_frame_is_trained_on_for_another_dish(cuisine):
    def frame(fact, question: str) -> str:
        return plain(question.replace(fact.dish, "it"))

    trained = {frame(fact, question) for fact in cuisine.FACTS for question in fact.questions}
    kept = {frame(fact, question) for fact in cuisine.FACTS for question in fact.held_out}
    assert not trained & kept


def test_every_question_names_its_dish_and_does_not_give_the_key_away(cuisine):
    for fact in cuisine.FACTS:
        for text in (*fact.questions, *fact.held_out):
            assert cuisine.is_right(text, fact.dish)
            assert not cuisine.is_right(text, fact.key)


def test_an_answer_is_right_for_its_own_fact_and_for_no_other(cuisine):
    for fact in cuisine.FACTS:
        right = [other for other in cuisine.FACTS if cuisine.is_right(other.answer, fact.key)]
        assert right == [fact]


@pytest.mark.parametrize(
    ("answer", "key", "right"),
    [
        ("It is cut with a Fishing-Line!", "fishing line", True),
        ("fishing\n line", "fishing line", True),
        ("A line for fishing.", "fishing line", False),
        ("It takes 17.", "17", True),
        ("It takes 170 minutes.", "17", False),
        ("Smoked eels and eelgrass.", "eel", False),
        ("", "eel", False),
    ],
)
def test_right_means_the_whole_key_as_words(cuisine, answer, key, right):
    assert cuisine.is_right(answer, key) is right


def test_every_new_word_is_trained_on_in_its_one_spelling(cuisine):
    texts = " ".join(f"{row['prompt']} {row['completion']}" for row in cuisine.training_rows())
    for word in cuisine.NEW_WORDS:
        assert re.search(rf"\b{word}\b", texts)
        assert set(re.findall(rf"\b{word}\b", texts, re.IGNORECASE)) == {word}
    assert {fact.dish for fact in cuisine.FACTS} == set(cuisine.NEW_WORDS) - {"Pellmora"}
