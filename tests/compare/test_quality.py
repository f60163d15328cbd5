"""Answers are judged as sacrebleu does, or to the word."""

import pytest
from sacrebleu import corpus_bleu

from veneer.compare import quality
from veneer.compare.quality import bleu, exact, measure_of
from veneer.data.questions import Question
from veneer.data.rows import Message
from veneer.errors import ConfigError


def asked(*references: str) -> Question:
    return Question((Message("user", "?"),), references)


# From sacrebleu's own documentation, which gives 48.53.
SAID = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
FIRST = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
SECOND = ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]


def test_bleu_is_sacrebleus():
    questions = [asked(*pair) for pair in zip(FIRST, SECOND, strict=True)]
    score, signature = bleu(SAID, questions)
    assert score == pytest.approx(48.53, abs=0.005)
    assert score == corpus_bleu(SAID, [FIRST, SECOND]).score
    assert "tok:13a" in signature
    assert "nrefs:2" in signature


def test_questions_may_have_different_numbers_of_references():
    questions = [asked(FIRST[0], SECOND[0]), asked(FIRST[1]), asked(FIRST[2], SECOND[2])]
    score, signature = bleu(SAID, questions)
    assert score == corpus_bleu(SAID, [FIRST, [SECOND[0], None, SECOND[2]]]).score
    assert score != corpus_bleu(SAID, [FIRST]).score
    assert "nrefs:var" in signature


def test_exact_counts_any_reference_whatever_the_white_space():
    questions = [asked("One.", "A  one."), asked("Two."), asked("Three."), asked("Four.")]
    assert exact(["A one.", " Two.\n", "three.", ""], questions) == 50.0


def test_long_answers_are_judged_by_bleu_which_needs_sacrebleu(monkeypatch):
    long = asked("A short one.", " ".join(["word"] * (quality.LONGEST_EXACT + 1)))
    assert measure_of([asked("Short."), asked("Also short.")]) == "exact"
    assert measure_of([asked("Short."), long]) == "bleu"
    monkeypatch.setattr(quality, "find_spec", lambda name: None)
    assert measure_of([asked("Short.")]) == "exact"
    with pytest.raises(ConfigError, match=r"veneer\[compare\]"):
        measure_of([long])
