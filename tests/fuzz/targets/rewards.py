"""What answers are judged by, and answers: patterns, and JSON schemas. A zero byte is between."""

from pathlib import Path
from random import Random

from fuzz.target import as_json
from support import mutated_files
from veneer.rewards.checkers import Matches, ValidJSON
from veneer.rewards.judged import Answered, RewardFault

MODULES = ("veneer.rewards.checkers",)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "pattern": "^x+$"}, "b": {"$ref": "#/properties/a"}},
    "anyOf": [{"required": ["a"]}, {"minProperties": 2}],
}


def seeds() -> list[bytes]:
    pattern = rb"(?P<answer>\d+)|[a-c]{2,}(?<=b)" + b"\0the answer is 42"
    return [pattern, b"(a|aa)+$\0" + b"a" * 40 + b"b", as_json(SCHEMA) + b'\0{"a": "xx"}']


def mutate(data: bytes, random: Random) -> bytes:
    if data.startswith(b"{"):
        return mutated_files.json_text(as_json(SCHEMA), random) + b'\0{"a": "xx"}'
    pattern = random.choice(mutated_files.EXPRESSIONS).encode()
    return pattern + b"\0" + b"a" * 50 + bytes([random.randrange(256)])


def read(data: bytes, place: Path) -> None:
    rule, _, answer = data.partition(b"\0")
    answered = Answered(answer.decode("utf-8", "surrogateescape"), references=("42",))
    try:
        if rule.startswith((b"{", b"[", b"t", b"f")):
            file = place / "schema.json"
            file.write_bytes(rule)
            ValidJSON(file)(answered)
        else:
            Matches(rule.decode("utf-8", "replace"), seconds=0.1)(answered)
    except RewardFault:  # such answers are left out
        pass
