"""What a run does with its data before it trains."""

import json

import pytest

import veneer
from veneer.data import sources
from veneer.errors import ConfigError, DataError
from veneer.training.events import DataReady, ModelReady, Notice


def test_the_data_is_read_once_even_where_new_tokens_are_looked_for(
    minigpt_home, tmp_path, monkeypatch
):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "xylophyte " * 3}))
    files = []
    parsed_values = sources.parsed_values

    def watched(file, parse):
        files.append(file)
        return parsed_values(file, parse)

    monkeypatch.setattr(sources, "parsed_values", watched)
    rows = veneer.DataConfig(new_words="auto")
    recipe = veneer.Recipe(str(minigpt_home), data, rows=rows, out=tmp_path / "out")
    events = veneer.tune(recipe)
    next(event for event in events if isinstance(event, DataReady))
    events.close()
    assert files == [data]


def before_training(minigpt_home, data, out, **settings) -> list:
    """Return the events of a run up to where the adapter is attached."""
    recipe = veneer.Recipe(str(minigpt_home), data, rows=veneer.DataConfig(**settings), out=out)
    events = []
    run = veneer.tune(recipe)
    for event in run:
        events.append(event)
        if isinstance(event, ModelReady):
            run.close()
    return events


def test_keys_that_nothing_reads_are_named_before_training(minigpt_home, tmp_path):
    data, evaluation = tmp_path / "rows.jsonl", tmp_path / "eval.jsonl"
    row = {"prompt": "a", "completion": "b"}
    data.write_text("\n".join(json.dumps({**row, "id": n}) for n in range(3)))
    evaluation.write_text(json.dumps({**row, "id": 3, "mood": "good"}))
    events = before_training(minigpt_home, data, tmp_path / "out", eval_data=evaluation)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert "Keys that nothing reads: 'id' (4 rows), 'mood' (1 row)." in notices


def test_a_directorys_splits_are_used_and_named(minigpt_home, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in {"train": 3, "validation": 2}.items():
        row = json.dumps({"prompt": "a", "completion": "b"})
        (folder / f"{name}.jsonl").write_text("\n".join([row] * rows))
    (folder / "test.jsonl").write_text("no row, and never read")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    for settings, held_out, says in [
        ({}, 2, "evaluated on: validation.jsonl; not read: test.jsonl"),
        ({"eval_data": other}, 1, "not read: validation.jsonl, test.jsonl"),
        ({"eval_rows": 1}, 1, "not read: validation.jsonl, test.jsonl"),
    ]:
        events = before_training(minigpt_home, folder, tmp_path / "out", **settings)
        (ready,) = (event for event in events if isinstance(event, DataReady))
        assert ready.summary.rows == (2 if "eval_rows" in settings else 3)
        assert ready.held_out.rows == held_out
        notices = [event.text for event in events if isinstance(event, Notice)]
        assert f"Trained on: train.jsonl; {says}" in notices


def test_valid_files_are_rows_to_evaluate_on(tmp_path):
    evaluated = veneer.TrainConfig(eval_every=1)
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(ConfigError, match="would do nothing without rows to evaluate on"):
        veneer.Recipe("base", tmp_path, training=evaluated, rows=veneer.DataConfig(eval_rows=0))
    (tmp_path / "valid.jsonl").touch()
    veneer.Recipe("base", tmp_path, training=evaluated)


def test_how_texts_become_rows_is_said(minigpt_home, tmp_path):
    data = tmp_path / "notes.txt"
    data.write_text("A short one.\n\n" + "A dog says woof. " * 20)
    events = before_training(minigpt_home, data, tmp_path / "out", max_length=32)
    notices = " ".join(event.text for event in events if isinstance(event, Notice))
    assert "each paragraph, up to a blank line, is a row" in notices
    assert "1 row longer than 32 tokens split" in notices
    (ready,) = (event for event in events if isinstance(event, DataReady))
    assert ready.summary.rows > 2
    assert (ready.summary.lost, ready.summary.longest <= 32) == (0, True)
    dropped = before_training(minigpt_home, data, tmp_path / "out", max_length=32, long_rows="drop")
    (ready,) = (event for event in dropped if isinstance(event, DataReady))
    assert (ready.summary.rows, ready.summary.dropped) == (1, 1)


def test_data_of_which_nothing_is_short_enough_is_refused(minigpt_home, tmp_path):
    data = tmp_path / "notes.txt"
    data.write_text("A dog says woof. " * 20)
    with pytest.raises(DataError, match="all rows are longer than --max-length"):
        before_training(minigpt_home, data, tmp_path / "out", max_length=9, long_rows="drop")
    with pytest.raises(
        ConfigError, match="long_rows is 'shorten', but must be one of cut, split, drop, error"
    ):
        veneer.DataConfig(long_rows="shorten")
