"""Several sources of rows: weights, patterns, sets of `datasets`, and rows that repeat others."""

import json
from pathlib import Path

import numpy as np
import pytest

import veneer
from support.row_tables import both_ways
from veneer.data import load
from veneer.data.load import RowFiles
from veneer.data.mixture import duplicates, weighted_rows
from veneer.errors import DataError
from veneer.training.events import Notice


def test_weights_are_shares_of_an_epoch_and_no_row_is_far_rarer_than_another():
    rows = weighted_rows([100, 10, 90], [0.5, 0.25, 0.25], seed=3)
    assert len(rows) == 200
    assert rows.tolist() == sorted(rows)
    counts = np.bincount(rows, minlength=200)
    assert [counts[:100].sum(), counts[100:110].sum(), counts[110:].sum()] == [100, 50, 50]
    assert set(counts[:100]) == {1}
    assert set(counts[100:110]) == {5}
    assert set(counts[110:]) == {0, 1}
    assert rows.tolist() != weighted_rows([100, 10, 90], [0.5, 0.25, 0.25], seed=4).tolist()


def test_sources_with_weights_patterns_and_wrong_ones(streamed, minigpt_home, tmp_path):
    for name in ("a1", "a2", "b"):
        rows = [json.dumps({"prompt": f"{name} {n}", "completion": "b"}) for n in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    data = (f"{tmp_path}/a*.jsonl:0.9", f"{tmp_path}/b.jsonl:.1")
    recipe = veneer.Recipe(
        str(minigpt_home), data, rows=veneer.DataConfig(eval_rows=0), out=tmp_path / "out"
    )
    assert recipe.settings()["data"] == list(data)
    run = veneer.tune(recipe)
    events = []
    for event in run:
        events.append(event)
        if isinstance(event, Notice) and "by the weights" in event.text:
            break
    run.close()
    assert "b.jsonl: 9 rows of 30" in events[-1].text
    assert "a*.jsonl: 81 rows of 60" in events[-1].text
    for wrong, says in [
        ([f"{tmp_path}/b.jsonl:1", f"{tmp_path}/a1.jsonl"], "to all data or to none"),
        ([f"{tmp_path}/b.jsonl:0"], "b.jsonl:0: a weight of data must be a number above 0"),
        ([f"{tmp_path}/b.jsonl:half"], "a number above 0, .* not 'half'"),
        ([f"{tmp_path}/c*.jsonl"], "matches nothing"),
        ([], "no data"),
        (["hf:name:3"], "hf:name:3: a number behind a name is a weight, .* write hf:name:3:1 for"),
    ]:
        with pytest.raises(veneer.VeneerError, match=says):
            RowFiles(wrong)


def test_sources_that_a_limit_leaves_out_are_named(streamed, minigpt_home, tmp_path, monkeypatch):
    data = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    for file in data:
        Path(file).write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" * 9)
    says = f"--limit 2 ends before {data[2]}"
    rows = veneer.DataConfig(eval_rows=0, limit=2)
    for size in (-1, 2**30):  # as a table, and in memory
        monkeypatch.setattr(load, "SMALL", size)
        run = veneer.tune(
            veneer.Recipe(str(minigpt_home), tuple(data), rows=rows, out=tmp_path / "out")
        )
        assert any(isinstance(event, Notice) and says in event.text for event in run)
        run.close()
        weighted = tuple(f"{file}:1" for file in data)
        recipe = veneer.Recipe(str(minigpt_home), weighted, rows=rows, out=tmp_path / "weighted")
        with pytest.raises(DataError, match=f"{says}, so that no row of it can be drawn"):
            list(veneer.tune(recipe))


def test_a_data_set_of_datasets(streamed, tokenizer, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    rows = [{"prompt": f"{n}", "completion": "b c"} for n in range(20)]
    folder = tmp_path / "set"
    (folder / "deep").mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"deep/{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    front = "---\nconfigs:\n- config_name: deep\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: deep/{split}.jsonl\n" for split in ("train", "validation")
    )
    (folder / "README.md").write_text(front + "---\n")
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(rows).save_to_disk(saved)
    for name, where in [
        (f"hf:{folder}:deep", f"hf:{folder}:deep@train:row 1"),
        (f"hf:{saved}", f"hf:{saved}@train:row 1"),
    ]:
        listed, tabled = both_ways(name, tokenizer, monkeypatch, max_length=32)
        assert list(tabled.examples) == listed.examples
        assert (len(listed.examples), listed.examples[0].where) == (20, where)
    assert len(RowFiles(f"hf:{folder}:deep", "valid").files) == 1
    with pytest.raises(DataError, match="cannot be loaded"):
        RowFiles(f"hf:{tmp_path}/nothing")


def test_duplicates_are_found_in_parts(streamed, tokenizer, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    texts = [f"text {n % 17}" for n in range(60)]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    listed, tabled = both_ways(file, tokenizer, monkeypatch, max_length=32)
    expected = [[n, n % 17] for n in range(17, 60)]
    monkeypatch.setattr("veneer.data.mixture.IN_MEMORY", 10)
    for examples in (listed.examples, tabled.examples):
        rows, firsts = duplicates(examples)
        assert np.stack([rows, firsts]).T.tolist() == expected
