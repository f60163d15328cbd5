"""What a run does with its data before it trains."""

import json

import veneer
from veneer.data import sources
from veneer.training.events import DataReady


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
