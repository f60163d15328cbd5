"""Every file gives all its good rows and all its problems, each with its place."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.random_adapters import tokenizer
from veneer.data.load import load_examples
from veneer.data.problems import Located, Place, Problem
from veneer.data.rows import PlainText, Row
from veneer.data.sources import check, files_of, read_rows, splits_of
from veneer.errors import DataError

GOOD = '{"text": "fine"}'


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(located: list[Located[Row]] | list[Problem]) -> list[int]:
    assert all(each.place.is_line for each in located)
    return [each.place.number for each in located]


TEN_BAD_LINES = [
    b"{broken",
    b'{"text": "\xff"}',
    b'{"text": "\\ud83d"}',
    b'{"text": "\\u0000"}',
    b"[1]",
    b'{"txt": "x"}',
    b'{"prompt": "a", "completion": ""}',
    b'{"messages": [{"role": "robot", "content": "x"}]}',
    b"[" * 100_000,
    b'{"text": ' + b"9" * 5000 + b"}",
]


def test_ten_problems_among_good_rows_are_all_named_with_their_lines(tmp_path):
    content = [line for bad in TEN_BAD_LINES for line in (GOOD.encode(), bad)]
    path = written(tmp_path / "rows.jsonl", b"\n".join(content))
    rows, problems = read_rows(path)
    assert lines(rows) == list(range(1, 20, 2))
    assert lines(problems) == list(range(2, 21, 2))
    assert {row.place.file for row in rows} == {str(path)}
    with pytest.raises(DataError, match=r"10 of 20 rows.*--skip-bad-rows") as raised:
        check(rows, problems[::-1], skip_bad_rows=False)
    assert raised.value.problems == tuple(map(str, problems))
    assert all(str(problem) in str(raised.value) for problem in problems)
    assert check(rows, problems, skip_bad_rows=True) == rows


def test_rows_that_are_mappings_are_read_as_those_of_a_file_are():
    tokens = tokenizer()
    good = {"text": "fine"}
    examples, skipped = load_examples([good, {"txt": "x"}, good], tokens, skip_bad_rows=True)
    assert [example.where for example in examples] == ["row 1", "row 3"]
    assert skipped == 1
    with pytest.raises(DataError, match=r"\n  row 3: a row must be an object, not"):
        load_examples([good, good, "fine"], tokens)
    for wrong in (good, 3):
        with pytest.raises(TypeError, match="A path or a list of rows is expected"):
            load_examples(wrong, tokens)


def test_invalid_utf8_is_named_with_its_byte_column(tmp_path):
    path = written(tmp_path / "rows.jsonl", '{"text": "é'.encode() + b'\xfe"}\n' + GOOD.encode())
    rows, problems = read_rows(path)
    assert lines(rows) == [2]
    assert list(map(str, problems)) == [f"{path}:1: not UTF-8: byte 0xfe at byte column 13"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".NDJSON", ".json", ".csv", ".tsv", ".txt", ".md"])
def test_byte_order_marks_line_ends_and_blank_lines_change_nothing(tmp_path, suffix, end, mark):
    content = {
        ".jsonl": [GOOD, "", GOOD],
        ".ndjson": [GOOD, "  ", GOOD],
        ".json": ["[" + GOOD, ",", GOOD + "]"],
        ".csv": ["text", "fine", "", "fine"],
        ".tsv": ["text\tid", "fine\t1", "", "fine\t2"],
        ".txt": ["fine", "", "fine"],
        ".md": ["fine", " ", "fine"],
    }[suffix.lower()]
    path = written(tmp_path / f"rows{suffix}", mark + end.join(line.encode() for line in content))
    rows, problems = read_rows(path)
    first = 2 if "sv" in suffix else 1
    assert not problems
    assert [row.value for row in rows] == [PlainText("fine")] * 2
    assert lines(rows) == [first, first + 2]


TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip),
    min_size=1,
    max_size=5,
)


@given(texts=TEXTS)
def test_all_formats_give_the_same_rows(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("formats")
    objects = [{"text": text} for text in texts]
    written(folder / "lines.jsonl", "\n".join(json.dumps(row) for row in objects))
    written(folder / "raw.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in objects))
    written(folder / "list.json", json.dumps(objects, indent=2))
    written(folder / "data.json", json.dumps({"version": 1, "data": objects}))
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    written(folder / "table.csv", "\n".join(["text", *quoted]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(objects), folder / "rows.parquet")
    for file in folder.iterdir():
        rows, problems = read_rows(file)
        assert (file.name, problems) == (file.name, [])
        assert [row.value for row in rows] == [PlainText(text) for text in texts]


def test_places_in_a_json_list_are_the_lines_where_rows_begin(tmp_path):
    objects = [{"text": "a\nb", "nested": {"x": [1, 2]}}, {"txt": 1}, {"text": "c"}]
    path = written(tmp_path / "rows.json", json.dumps(objects, indent=1))
    begins = [n for n, line in enumerate(path.read_text().split("\n"), 1) if line == " {"]
    rows, problems = read_rows(path)
    assert lines(rows) == [begins[0], begins[2]]
    assert lines(problems) == [begins[1]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (f"{GOOD}\n{GOOD}", ":2: not JSON: Extra data at column 1; .*name the file .jsonl"),
        (f"[{GOOD},\n{GOOD}\n", ":3: not JSON: "),
        ('[{"text": "a"},\n{"text": "cut o', ":2: not JSON: it ends at column 16, in a string"),
        ('[{"text": "a"},\n{"text": 1', ":2: not JSON: .* at column 11"),
        ('{"rows": []}', ":1: the file must hold a list of rows"),
        (b'[{"text": "a"},\n {"text": "\xc3("}]', ":2: not UTF-8: byte 0xc3 at byte column 12"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_problems_of_a_whole_json_file(tmp_path, content, says):
    rows, problems = read_rows(written(tmp_path / "rows.json", content))
    assert rows == []
    with pytest.raises(DataError, match=says):
        check(rows, problems, skip_bad_rows=True)


def test_problems_in_tables_are_named_with_their_lines(tmp_path):
    content = [
        b"prompt,completion",
        b'"two',
        b'lines",yes',
        b"only one",
        b"a,b,c",
        b"\xff,b",
        b"q,",
        b'q,"a"b',
        b"q,last",
    ]
    path = written(tmp_path / "rows.csv", b"\n".join(content))
    rows, problems = read_rows(path)
    assert lines(rows) == [2, 9]
    assert [str(problem).removeprefix(f"{path}:") for problem in problems] == [
        "4: 1 cells, but the header has 2",
        "5: 3 cells, but the header has 2",
        "6: not UTF-8: byte 0xff at byte column 1",
        "7: 'completion' is empty, so there is nothing to learn",
        "8: not CSV: ',' expected after '\"'",
    ]


def test_semicolons_separate_cells_where_the_header_has_no_comma(tmp_path):
    content = '\ufeffprompt;completion\na, b;"c;d"\n'
    (row,), problems = read_rows(written(tmp_path / "rows.csv", content))
    assert not problems
    assert [turn.content for turn in row.value.messages] == ["a, b", "c;d"]
    # A header of one cell is none of this.
    (row,), _ = read_rows(written(tmp_path / "one.csv", "text\nc;d\n"))
    assert row.value.text == "c;d"


def test_a_cell_may_be_longer_than_the_csv_modules_limit(tmp_path):
    path = written(tmp_path / "rows.csv", "text\n" + "long " * 40_000)
    assert len(read_rows(path)[0]) == 1


def test_parquet_places_are_rows_and_nested_messages_are_read(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    table = pyarrow.table({"messages": [turns, [], turns], "text": [None, None, None]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows, problems = read_rows(tmp_path / "rows.parquet")
    file = str(tmp_path / "rows.parquet")
    assert [row.place for row in rows] == [Place(file, n, is_line=False) for n in (1, 3)]
    assert str(problems[0]).startswith(f"{file}:row 2: ")
    with pytest.raises(DataError, match="not a parquet file"):
        read_rows(written(tmp_path / "bad.parquet", "no"))


def test_paragraphs_keep_their_lines_and_stand_where_they_begin(tmp_path):
    path = written(tmp_path / "notes.txt", b"\n\none\n two\n\n\xffbad\n\nthree\n")
    rows, problems = read_rows(path)
    assert [row.value for row in rows] == [PlainText("one\n two"), PlainText("three")]
    assert lines(rows) == [3, 8]
    assert list(map(str, problems)) == [f"{path}:6: not UTF-8: byte 0xff at byte column 1"]


def test_a_directory_is_all_its_files_in_order_of_name(tmp_path):
    written(tmp_path / "b.txt", "second")
    written(tmp_path / "a.jsonl", '{"text": "first"}')
    written(tmp_path / "script.py", "ignored")
    rows, problems = read_rows(tmp_path)
    assert not problems
    assert [row.value.text for row in rows] == ["first", "second"]


def folder_with(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        written(folder / name, json.dumps({"text": name}))
    return folder


@pytest.mark.parametrize(
    ("names", "train", "valid", "others"),
    [
        (["train.jsonl", "valid.jsonl", "test.jsonl"], ["train.jsonl"], ["valid.jsonl"], []),
        (
            ["train-0.jsonl", "Train_1.jsonl", "validation-0.jsonl", "notes.jsonl"],
            ["Train_1.jsonl", "train-0.jsonl"],
            ["validation-0.jsonl"],
            ["notes.jsonl"],
        ),
        (["facts.jsonl", "test.jsonl"], ["facts.jsonl"], [], []),
        (["trains.jsonl", "testimony.jsonl", "valider.jsonl"], None, [], []),
    ],
)
def test_a_directorys_files_are_the_splits_that_they_name(tmp_path, names, train, valid, others):
    folder = folder_with(tmp_path / "data", *names)
    splits = splits_of(folder)
    train = sorted(names) if train is None else train
    assert [file.name for file in splits.train] == train
    assert [file.name for file in splits.valid] == valid
    assert [file.name for file in splits.others] == others
    assert [row.value.text for row in read_rows(folder)[0]] == train
    assert [row.value.text for row in read_rows(folder, split="valid")[0]] == (valid or train)
    assert [file.name for file in files_of(folder, "test")] == (
        ["test.jsonl"] if "test.jsonl" in names else train
    )


def test_a_directory_with_nothing_to_train_on_is_refused(tmp_path):
    folder = folder_with(tmp_path / "data", "test.jsonl", "valid.jsonl")
    with pytest.raises(DataError, match=r"no file to train on, only valid.jsonl, test.jsonl"):
        read_rows(folder)
    assert len(read_rows(folder, split="valid")[0]) == 1


@given(limit=st.integers(1, 6))
def test_a_limit_takes_the_first_good_rows(tmp_path_factory, limit):
    folder = tmp_path_factory.mktemp("limit")
    written(folder / "a.jsonl", f"{GOOD}\n[]\n{GOOD}\n")
    written(folder / "b.jsonl", f"{GOOD}\n")
    rows, _ = read_rows(folder)
    assert read_rows(folder, limit=limit)[0] == rows[:limit]


def test_what_cannot_be_read_says_what_to_do(tmp_path):
    written(tmp_path / "train.jsonl", "\n\n")
    written(tmp_path / "train.docx", "x")
    (tmp_path / "nothing").mkdir()
    for name, says in {
        "trian.jsonl": "does not exist; did you mean 'train.jsonl'",
        "train.docx": r"unknown kind; .*\.jsonl",
        "train.jsonl": "holds no rows",
        "nothing": "no file of a known kind",
    }.items():
        with pytest.raises(DataError, match=says):
            read_rows(tmp_path / name)


def test_many_problems_are_counted_where_they_are_not_shown():
    problems = [Problem(Place("f", n), "wrong") for n in range(1, 61)]
    with pytest.raises(DataError, match=r"and 10 more") as raised:
        check([], problems, skip_bad_rows=False)
    assert len(raised.value.problems) == 60
    assert len(str(raised.value).split("\n")) == 52
