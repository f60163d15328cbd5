"""Files of rows of every kind that is read. The first byte says which kind."""

import io
from functools import cache
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet

from fuzz.target import as_json
from support import mutated_files
from veneer.data.pairs import parse_pair
from veneer.data.readers import READERS
from veneer.data.rows import parse_row
from veneer.data.sources import read_values

MODULES = ("veneer.data.readers", "veneer.data.rows", "veneer.data.messages", "veneer.data.pairs")
ENDINGS = (*sorted(READERS), ".jsonl.gz", ".csv.zst")
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = (
    {"prompt": "a", "completion": "b", "system": "c"},
    {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]]},
    {"question": "a", "answer": "b"},
    {"text": "a"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": TURNS[:1], "completion": TURNS[1:], "label": True},
)


@cache
def seeds() -> list[bytes]:
    lines = b"\n".join(map(as_json, ROWS))
    table = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"prompt": "a", "completion": "b"}]), table
    )
    of_kind = {
        ".jsonl": lines,
        ".json": as_json({"data": ROWS}),
        ".csv": b'prompt,completion\r\n"a, ""b""",c\r\n',
        ".tsv": b"question\tanswer\na\tb\n",
        ".txt": b"one\ntwo\n\nthree\n",
        ".parquet": table.getvalue(),
    }
    return [bytes([ENDINGS.index(kind)]) + content for kind, content in of_kind.items()]


def mutate(data: bytes, random: Random) -> bytes:
    if data[:1] == bytes([ENDINGS.index(".jsonl")]):
        line = random.choice(ROWS)
        return data[:1] + mutated_files.json_text(as_json(line), random).replace(b"\n", b" ")
    return data[:1] + mutated_files.any_bytes(data[1:] or b"x", random)


def read(data: bytes, place: Path) -> None:
    kind = ENDINGS[data[0] % len(ENDINGS)] if data else ".jsonl"
    file = place / f"rows{kind}"
    file.write_bytes(data[1:])
    read_values(file, parse_pair if len(data) % 2 else parse_row)
