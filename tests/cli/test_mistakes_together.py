"""Commands that load a base check what is cheap first, and show every mistake in one error."""

import pytest

import veneer


@pytest.fixture(autouse=True)
def _no_base_is_loaded(monkeypatch, tmp_path):
    def load(*_, **__):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(veneer, "load_base", load)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("command", "opening", "says"),
    [
        (
            "merge bas adapte rows.jsonl --probe row.jsonl",
            "Nothing is merged, for 4 reasons:",
            [
                "rows.jsonl is there already",
                "row.jsonl does not exist; did you mean 'rows.jsonl'?",
                "There is no adapter directory adapte",
                "'bas' is no model here",
            ],
        ),
        (
            "generate bas --adapter adapte hello",
            "Nothing is loaded, for 2 reasons:",
            ["There is no adapter directory adapte", "'bas' is no model here"],
        ),
        ("generate base --adapter adapte hello", "Error: There is no adapter directory adapte", []),
        (
            "compare base row.jsonl --test tests.jsonl --out rows.jsonl",
            "Nothing can be compared, for 3 reasons:",
            [
                "rows.jsonl is a file, but --out must name a directory",
                "row.jsonl does not exist; did you mean 'rows.jsonl'?",
                "tests.jsonl does not exist",
            ],
        ),
        (
            "generate qwen3-7b --adapter adapte hello",
            "Nothing is loaded, for 2 reasons:",
            ["There is no adapter directory adapte", "These are presets of veneer plan"],
        ),
    ],
)
def test_all_mistakes_are_in_one_error(command, opening, says, refused):
    error = refused(*command.split())
    assert opening in error
    assert error.count(" - ") == len(says)
    assert all(text in error for text in says)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("tune", "MODEL is missing. Built-in name"),
        ("tune base", "DATA is missing. Rows to learn"),
        ("convert base out", "--to is missing. Format to write: native, peft, "),
        ("generate", "Give either a PROMPT or --prompts FILE."),
        ("generate hi", "MODEL is missing: veneer generate MODEL hi."),
        ("generate base", "PROMPT is missing: veneer generate base PROMPT"),
        ("tune base rows.jsonl --bits 3", '"3" for --bits. Choose from: 4, 8, 16, auto.'),
        ("generate base --prompts rows.jsonl --out no/x.jsonl", "There is no directory no"),
    ],
)
def test_what_is_missing_is_named(command, says, refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert says in refused(*command.split())
