"""OpenAI's graders: what they give, what of them is refused, and that nothing in them is code."""

from __future__ import annotations

import json
import math
import random
from datetime import date

import pytest
from openai.types.graders import MultiGrader, StringCheckGrader, TextSimilarityGrader

from veneer.errors import ConfigError
from veneer.rewards import graders
from veneer.rewards.formula import formula_of
from veneer.rewards.graders import Graded, grader_of
from veneer.rewards.judged import Answered, RewardFault
from veneer.rewards.named import reward_named
from veneer.rewards.similarity import METRICS, MOST_CHARACTERS, common_length
from veneer.rewards.template import template_of

ANSWER, TRUE = "{{ sample.output_text }}", "{{item.answer}}"


def check(operation="eq", **other):
    values = {"type": "string_check", "name": "right", "input": ANSWER, "reference": TRUE}
    return values | {"operation": operation} | other


def alike(metric="fuzzy_match", **other):
    values = {"type": "text_similarity", "name": "near", "input": ANSWER, "reference": TRUE}
    return values | {"evaluation_metric": metric} | other


def grade(grader, text, **item):
    return Graded(grader_of(grader))(Answered(text, item=item))


@pytest.mark.parametrize(
    ("operation", "text", "expected"),
    [
        ("eq", "7", 1),
        ("eq", "7 ", 0),
        ("ne", "7", 0),
        ("ne", "8", 1),
        ("like", "It is 7.", 1),
        ("like", "It is 8.", 0),
    ],
)
def test_texts_are_compared(operation, text, expected):
    assert StringCheckGrader(**check(operation)).operation == operation  # OpenAI's own type
    assert grade(check(operation), text, answer="7") == expected


def test_case_counts_only_where_it_should():
    assert grade(check("like"), "STRASSE 1", answer="straße") == 0
    assert grade(check("ilike"), "STRASSE 1", answer="straße") == 1


def naive(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            longer = max(table[i - 1][j], table[i][j - 1])
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else longer
    return table[-1][-1]


def test_the_common_subsequence_is_that_of_the_table():
    draw = random.Random(1)
    for _ in range(200):
        a, b = ("".join(draw.choices("abc", k=draw.randrange(20))) for _ in range(2))
        assert common_length(a, b) == naive(a, b), (a, b)


def test_texts_are_alike_by_characters_and_by_words():
    assert TextSimilarityGrader(**alike()).evaluation_metric == "fuzzy_match"
    assert grade(alike(), "abcd", answer="abxd") == 6 / 8
    a, b = "The cat sat on the mat.", "the cat lay on a mat"
    expected = {"rouge_1": 8 / 12, "rouge_2": 2 / 10, "rouge_3": 0.0, "rouge_l": 8 / 12}
    for metric, value in expected.items():
        assert grade(alike(metric), a, answer=b) == pytest.approx(value), metric
    for metric in METRICS:
        assert grade(alike(metric), a, answer=a) == 1
        assert grade(alike(metric), "", answer=a) == 0
        assert grade(alike(metric), a, answer="9") == 0


FORMULAS = """1+2*3-4/8; -2^2; 2^-1; 2^3^2; -(a-b)*2; 8/4/2; 8-4-2; 1.5e1*.5; 2**3; --1; +a; ((a))
min(a, b, 0.1); max(1,a); abs(-a); floor(2.7); ceil(2.1); exp(a); sqrt(4); log(b); 0.5 * a + 0.5 * b
"""


@pytest.mark.parametrize("text", FORMULAS.replace("\n", ";").strip("; ").split(";"))
def test_a_formula_is_computed_as_python_would(text):
    values = {"a": 0.25, "b": 0.75}
    known = {name: getattr(math, name) for name in ("floor", "ceil", "exp", "sqrt", "log")}
    formula = formula_of(text)
    assert formula(values) == eval(text.replace("^", "**").strip(), known | values)
    assert formula.names <= {"a", "b"}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "ends too early"),
        ("1 +", "ends too early"),
        ("(1", r"'\)' is expected at the end"),
        ("1 2", "'2' is not expected"),
        ("a.b", r"'\.' is not expected"),
        ("a[0]", r"'\[' is not expected"),
        ("mix(a, b)", "mix is none of the functions.* did you mean 'min'"),
        ("__import__('os')", "__import__ is none of the functions"),
        ("sqrt(1, 2)", "takes one number, not 2"),
        ("(" * 60 + "1" + ")" * 60, "more than 50 brackets"),
        ("-" * 60 + "1", "more than 50 brackets"),
        ("2²", "'²' is not expected"),
        ("1+" * 600 + "1", "1,201 characters"),
    ],
)
def test_what_is_no_formula_is_refused(text, fault):
    with pytest.raises(ValueError, match=fault):
        formula_of(text)


def within(depth, call):
    return call() if depth == 0 else within(depth - 1, call)


def test_a_long_formula_is_computed_at_any_depth_of_the_program():
    assert within(450, lambda: formula_of("1+" * 499 + "1")({})) == 500


def test_a_formula_weighs_graders():
    multi = {
        "type": "multi",
        "name": "both",
        "graders": {"right": check("like"), "near": alike()},
        "calculate_output": "0.8 * right + 0.2 * near",
    }
    assert MultiGrader(**multi | {"graders": check()}).name == "both"
    assert grade(multi, "7", answer="7") == 1
    assert grade(multi, "17", answer="7") == pytest.approx(0.8 + 0.2 * 2 / 3)
    alone = multi | {"graders": check(), "calculate_output": "1 / right"}
    assert grade(alone, "7", answer="7") == 1
    with pytest.raises(RewardFault, match="division by zero") as fault:
        grade(alone, "8", answer="7")
    assert fault.value.kind == "not a finite number"
    for text in ("1e308 * 10 * right", "exp(1000 * right)", "(0 - right)^0.5", "log(0 * right)"):
        with pytest.raises(RewardFault):
            grade(alone | {"calculate_output": text}, "7", answer="7")


def test_templates_reach_into_rows_and_into_answers_in_json():
    item = {"a": {"b": ["x", 7, True]}, "e": None}
    text = template_of("{{item.a.b[0]}}, {{ item.a.b[1] }}, {{ item.a.b[2] }}, {{ item.a }} }} {")
    assert text.fill(item, "") == 'x, 7, true, {"b": ["x", 7, true]} }} {'
    made = check("eq", input="{{ sample.output_json.sum }}")
    assert grade(made, '{"sum": 7}', answer="7") == 1
    for text in ('{"total": 7}', "no JSON", "[" * 100_000, '{"sum": null}'):
        assert grade(made, text, answer="7") == 0, text
    for place in ("item.e", "item.a.c", "item.a.b[9]", "item.a.b.0", "item.answer[0]"):
        with pytest.raises(RewardFault, match="has no"):
            grade(check(reference=f"{{{{ {place} }}}}"), "", **item, answer="text")


def test_what_a_row_lacks_is_told_with_what_it_has():
    both = Graded(grader_of(check(input="{{ item.other }}")))
    assert both.lacks({"answer": 1, "other": ""}) == ""
    assert (
        both.lacks({"b": 1})
        == "the row has no item.answer, item.other, which right reads; it has b"
    )


MULTI = {"type": "multi", "name": "m", "graders": {"a": check()}, "calculate_output": "a"}


@pytest.mark.parametrize(
    ("grader", "faults"),
    [
        ([], ["grader must be an object with a type"]),
        ({"type": "string_chek"}, ["'string_chek', and may be .*did you mean 'string_check'"]),
        ({"type": "python", "source": "1"}, ["python: it runs a client's code"]),
        ({"type": "endpoint"}, ["endpoint: it calls another server"]),
        ({"type": "score_model"}, ["score_model: it asks another model"]),
        (check("equal", refernce="x"), ["refernce is not known", "'equal', and may be eq"]),
        (check(input=7, name=""), ["name must be a text", "input must be a text"]),
        (alike("cosine"), ["cosine is not here: .*there are fuzzy_match, rouge_1"]),
        (check(name="\ud800"), ["half a character"]),
        (check(input="{{ item.a | upper }}"), ["input: {{ item.a . upper }} names neither"]),
        (check(input="{{ item }}"), ["names neither a field"]),
        (check(input="{{ item.a"), ["has no }}"]),
        (check(input="{{" * 5_000), ["it has 5,000 places to fill, and may have 32"]),
        (check(input="x" * 20_001), ["it has 20,001 characters"]),
        (check(name="x" * 201), ["name has 201 characters"]),
        (MULTI | {"graders": {"a" * 50_000: check()}}, ["it has 50,... characters, and may have"]),
        (check(input="{{ sample.choices }}"), ["there is no sample.choices"]),
        (check(input="{{ item.__class__() }}"), ["names neither"]),
        (MULTI | {"calculate_output": "a +"}, ["calculate_output: it ends too early"]),
        (MULTI | {"calculate_output": "b"}, ["reads 'b', which no grader is"]),
        (MULTI | {"graders": {}}, ["graders must be graders, each by a name"]),
        (MULTI | {"graders": {"a": MULTI}}, ["graders.a.type is 'multi', and may be string_check"]),
        (MULTI | {"graders": {"a": {"type": "python"}}}, ["graders.a is of the type python"]),
    ],
)
def test_all_that_is_wrong_with_a_grader_is_said_at_once(grader, faults):
    with pytest.raises(ConfigError) as refused:
        grader_of(grader)
    for fault in faults:
        assert refused.match(fault)


def test_similarities_of_a_formula_take_no_longer_than_one():
    for count in (1, 2, 32):
        named = {f"a{i}": alike() for i in range(count)}
        formula = {"type": "multi", "name": "all", "graders": named, "calculate_output": "a0"}
        compared = [each.most for each in grader_of(formula).graders.values()]
        assert sum(most**2 for most in compared) <= MOST_CHARACTERS**2
        assert len(compared) == count
    assert grader_of(alike()).most == MOST_CHARACTERS
    far = "b" * compared[0]  # behind it nothing is compared
    assert grade(formula, far + "a", answer=far + "c") == 1


def test_a_guess_is_made_for_the_faults_that_are_shown(monkeypatch):
    guessed = []
    monkeypatch.setattr(graders, "nearest", lambda name, names: guessed.append(name) or "")
    with pytest.raises(ConfigError, match="key49 is not known; and 950 more"):
        grader_of(check(**{f"key{i}": 1 for i in range(1000)}))
    assert len(guessed) == 50


def test_a_date_of_a_table_is_its_text():
    row = {"answer": date(2026, 1, 2), "days": [date(2026, 1, 2)]}
    assert grade(check(), "2026-01-02", **row) == 1
    assert grade(check(reference="{{ item.days }}"), '["2026-01-02"]', **row) == 1


def test_a_grader_is_a_reward_of_a_file(tmp_path):
    file = tmp_path / "grader.json"
    file.write_text(json.dumps(check()))
    reward = reward_named(f"grader:{file}", seconds=1)
    assert (reward.name, reward(Answered("7", item={"answer": 7}))) == ("right", 1)
    file.write_text("{")
    with pytest.raises(ConfigError, match="holds no grader"):
        reward_named(f"grader:{file}", seconds=1)
