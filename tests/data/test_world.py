"""The built-in world: the same for everyone, complete, and never of two minds."""

import re

from veneer.data.rows import Conversation, PlainText, Row
from veneer.data.world import facts
from veneer.data.world_text import world_text

DOCUMENTS = 3000


def sentences(rows: list[Row]) -> list[str]:
    texts = []
    for row in rows:
        if isinstance(row, PlainText):
            texts += re.findall(r"[^.]+\.", row.text)
        else:
            texts += [message.content for message in row.messages]
    return [text.strip() for text in texts]


def test_the_seed_decides_everything():
    assert world_text(3, 200) == world_text(3, 200)
    assert world_text(3, 200) != world_text(4, 200)
    assert world_text(3, 200)[:50] == world_text(3, 50)


def test_the_world_is_small_and_every_fact_has_several_phrasings():
    world = facts()
    assert 150 <= len(world) <= 250
    assert all(len(set(fact.statements)) >= 2 for fact in world)
    assert all(len(set(fact.questions)) >= 2 for fact in world)


def test_rows_are_mostly_paragraphs_of_a_few_sentences():
    rows = world_text(0, DOCUMENTS)
    paragraphs = [row for row in rows if isinstance(row, PlainText)]
    lengths = {len(sentences([row])) for row in paragraphs}
    assert len(rows) == DOCUMENTS
    assert 0.55 < len(paragraphs) / len(rows) < 0.65
    assert {2, 3, 4} <= lengths <= {1, 2, 3, 4}
    assert len({row.text for row in paragraphs}) > 0.9 * len(paragraphs)


def test_every_completion_occurs_and_nothing_else_ever_follows_its_prompt():
    prompts = {fact.prompt: fact.value for fact in facts()}
    assert len(prompts) == len(facts())
    # All phrasings that there are, and not a sample: what they do not hold, no seed makes.
    phrasings = {text.lower() for fact in facts() for text in fact.statements + fact.questions}
    for prompt, answer in prompts.items():
        begin = rf"\b{re.escape(prompt.lower())}\b"
        following = [text[hit.end() :] for text in phrasings for hit in re.finditer(begin, text)]
        assert following, prompt
        assert all(re.match(rf" {re.escape(answer.lower())}\b", rest) for rest in following), prompt


def test_a_moderate_sample_has_every_fact_both_ways():
    rows = world_text(1, DOCUMENTS)
    stated = set(sentences([row for row in rows if isinstance(row, PlainText)]))
    replied = set(sentences([row for row in rows if isinstance(row, Conversation)]))
    for fact in facts():
        assert stated & set(fact.statements), fact
        assert fact.answer in replied, fact
        assert f"{fact.prompt} {fact.value}" in fact.answer


def test_the_text_is_nothing_but_phrasings_of_facts():
    phrasings = {text for fact in facts() for text in fact.statements + fact.questions}
    assert set(sentences(world_text(2, DOCUMENTS))) <= phrasings


def test_a_question_has_one_answer():
    answers: dict[str, str] = {}
    for fact in facts():
        for question in fact.questions:
            assert question.endswith("?")
            assert answers.setdefault(question, fact.answer) == fact.answer
    for row in world_text(5, DOCUMENTS):
        if isinstance(row, Conversation):
            question, reply = row.messages
            assert (question.role, reply.role) == ("user", "assistant")
            assert answers[question.content] == reply.content
