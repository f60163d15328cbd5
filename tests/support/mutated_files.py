"""Spoil files, by accident or malice: each result is a function of a good file and a seed."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import gguf

Mutate = Callable[[bytes, Random], bytes]
NUMBERS = (
    0,
    1,
    2,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**60,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
# Expressions that keep a matcher busy for ever, invalid ones, and large ones.
EXPRESSIONS = (
    "(a|aa)+$",
    r"(([a-z_0-9])+\.?)+[A-Z]",
    r"(.*)*(.*)*(.*)*\1\2\3!",
    r"(\w+\.?)*(\w+\.?)*(\w+\.?)*[^\w.]",
    "(?:(?:(?:.?){20}){20}){20}[A-Z]",
    "(" * 5000,
    "(" * 200 + ")" * 200,
    "a{99999999999}",
    "(?i)q_proj",
    "[",
    "x" * 30_000,
    ".*",
    "",
    "(?P<n>q)_(?P=n)",
)
HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    2**70,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    -0.0,
    "",
    "q_proj",
    "x" * 100_000,
    "naïve 𝕏 \x00 \u202e",
    [],
    {},
    [None],
    [[]],
    ["q_proj", 3],
    ["q_proj"] * 1000,
    {"a": {"b": []}},
    {"q_proj": -1},
    {"q_proj": 10**400},
    {"": 1},
    *EXPRESSIONS,
    *({pattern: 2} for pattern in EXPRESSIONS),
    [[[[[[[[[[{}]]]]]]]]]],
    list(range(5000)),
)
STRANGE = {
    "auto_map": {"AutoModelForCausalLM": "sprung.Sprung"},
    "auto_mapping": {"base_model_class": "Sprung", "parent_library": "sprung"},
    "tokenizer_kwargs": {"trust_remote_code": True},
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "__class__": "os.system",
    "layers_to_transform": [10**9],
    "layers_pattern": "(a|aa)+$",
    "eva_config": {"x": 1},
    "runtime_config": {"ephemeral_gpu_offload": True},
}


def any_bytes(content: bytes, random: Random, *, head: int = 600) -> bytes:
    """Flip bits, cut, lengthen, repeat, remove, or write an extreme number somewhere."""
    spoilt = bytearray(content)
    way = random.randrange(7)
    if way == 0:
        return content[: random.randrange(len(content))]
    if way == 1:
        return content + random.randbytes(random.choice((1, 8, 1000)))
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        # The first bytes are headers and names, where a fault does more than change a number.
        at = random.randrange(min(head, len(spoilt)) if random.random() < 0.8 else len(spoilt))
        if way == 2:
            spoilt[at] ^= 1 << random.randrange(8)
        elif way == 3:
            spoilt[at] = random.randrange(256)
        elif way == 4:
            del spoilt[at : at + random.choice((1, 4, 8, 64))]
        elif way == 5:
            spoilt[at:at] = spoilt[at : at + random.choice((1, 8, 64))]
        else:
            write_number(spoilt, at, random)
        if not spoilt:
            break
    return bytes(spoilt)


def write_number(content: bytearray, at: int, random: Random) -> None:
    number = struct.pack("<Q", random.choice(NUMBERS))[: random.choice((1, 4, 8))]
    content[at : at + len(number)] = number


def json_text(content: bytes, random: Random) -> bytes:
    """Put hostile values, strange keys, the same key twice, depth or damage into a JSON object."""
    way = random.randrange(8)
    if way == 0:
        return any_bytes(content, random)
    value = json.loads(content)
    for _ in range(random.choice((1, 1, 2, 4))):
        key = random.choice(sorted(value))
        if way < 5:
            value[key] = random.choice(HOSTILE)
        elif way == 5:
            value.pop(key, None)
        else:
            strange = random.choice(sorted(STRANGE))
            value[strange] = STRANGE[strange]
        if not value:
            break
    text = json.dumps(value, indent=random.choice((None, 2)))
    if way == 7:
        twice = json.dumps(random.choice(HOSTILE))
        text = text[:-1] + f', "{random.choice(sorted(value))}": {twice}}}'
        if random.random() < 0.3:
            depth = random.choice((50, 5000, 200_000))
            text = text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
        if random.random() < 0.3:
            text = text.replace(": 1", f": {'9' * 5000}", 1)
    return text.encode("utf-8", "surrogatepass")


def is_of_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def safetensors(content: bytes, random: Random) -> bytes:
    """Change a tensor's entry in the header, the header's length, or bytes."""
    way = random.randrange(4)
    if way == 0:
        return any_bytes(content, random, head=1000)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    names = [name for name in sorted(header) if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    entry = header[name]
    ways: list[Callable[[], Any]] = [
        lambda: entry.update(shape=[random.choice(NUMBERS) for _ in range(random.randrange(5))]),
        lambda: entry.update(shape=entry["shape"][::-1]),
        lambda: entry.update(shape=[-1, *entry["shape"]]),
        lambda: entry.update(shape=[1] * random.choice((5, 100, 5000)) + entry["shape"]),
        lambda: entry.update(data_offsets=header[other]["data_offsets"]),
        lambda: entry.update(data_offsets=[random.choice(NUMBERS), random.choice(NUMBERS)]),
        lambda: entry.update(data_offsets=entry["data_offsets"][::-1]),
        lambda: entry.update(
            data_offsets=[x + random.choice((-4, 1, 4)) for x in entry["data_offsets"]]
        ),
        lambda: entry.update(
            dtype=random.choice(("F16", "BF16", "F64", "I64", "BOOL", "F4", "", "C64"))
        ),
        lambda: entry.update(
            {random.choice(("shape", "dtype", "data_offsets")): random.choice(HOSTILE)}
        ),
        lambda: entry.pop(random.choice(sorted(entry))),
        lambda: header.update({name: random.choice(HOSTILE)}),
        lambda: header.pop(name),
        lambda: header.update(
            {random.choice(("x", "𝕏" * 50, "a." * 5000, "\x00", "")): header.pop(name)}
        ),
        lambda: header.update(__metadata__=random.choice(HOSTILE)),
        lambda: data.__setitem__(slice(0, 4), struct.pack("<f", 0.25)),
        lambda: data.__setitem__(slice(0, 4), struct.pack("<f", float("nan"))),
        lambda: data.__setitem__(slice(4, 8), struct.pack("<f", float("-inf"))),
        # Of ordinary entries: of those with 5,000 dimensions it would take hundreds of megabytes.
        lambda: header.update(
            {f"x{i}": dict(entry) for i in range(2000 // len(entry["shape"] or [0]))}
        ),
    ]
    for _ in range(random.choice((1, 1, 2))):
        lists = (entry.get(key) for key in ("shape", "data_offsets"))
        # The first change may leave no lists for the second one to change.
        if name in header and all(
            isinstance(numbers, list) and is_of_numbers(numbers) for numbers in lists
        ):
            random.choice(ways)()
    text = json.dumps(header)
    if way == 3:
        text = random.choice(
            (
                text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}",  # the same key twice
                text[:-1] + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}",
                text + " " * random.choice((1, 7, 100_000)),
                text.replace('"F32"', '"F32" ', 1),
                "[" + text + "]",
                text[: random.randrange(len(text))],
            )
        )
    raw = text.encode("utf-8", "surrogatepass")
    length = (
        len(raw) if random.random() < 0.8 else random.choice((*NUMBERS, len(raw) + 1, len(raw) - 1))
    )
    return (length % 2**64).to_bytes(8, "little") + raw + bytes(data)


def gguf_file(content: bytes, random: Random, places: list[int]) -> bytes:
    """Write extreme numbers over counts, lengths, kinds and shapes, or damage bytes."""
    if random.random() < 0.4:
        return any_bytes(content, random, head=max(places) + 8)
    spoilt = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.choice(places)
        if random.random() < 0.5:
            write_number(spoilt, at, random)
        else:
            spoilt[at] = (spoilt[at] + random.choice((-1, 1, 2, 16))) % 256
    return bytes(spoilt)


def gguf_places(path: Path) -> list[int]:
    """Return the offsets of the numbers in a GGUF file's header."""
    reader = gguf.GGUFReader(path)
    places = [4, 8, 16]
    fields = [f for f in reader.fields.values() if not f.name.startswith("GGUF.")]
    for field in (*fields, *(tensor.field for tensor in reader.tensors)):
        at = field.offset
        for array in field.parts:
            if array.dtype.itemsize > 1 or array.size == 1:
                places.append(at)
            at += array.nbytes
    return places
