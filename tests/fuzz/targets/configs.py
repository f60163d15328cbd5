"""A base's config.json, and the checksums beside files."""

from functools import cache
from pathlib import Path
from typing import Any

from support import mutated_files
from support.tiny_models import tiny
from veneer.checksums import SUMS, check_sums
from veneer.models.load import load_config

MODULES = ("veneer.models.load", "veneer.checksums")
mutate = mutated_files.json_text


@cache
def seeds() -> list[bytes]:
    texts = [tiny(name).config.to_json_string() for name in ("llama", "gemma3", "minigpt")]
    return [*(text.encode() for text in texts), b"0" * 64 + b"  config.json\n"]


def read(data: bytes, place: Path) -> Any:
    if data.lstrip().startswith(b"{"):
        (place / SUMS).unlink(missing_ok=True)
        (place / "config.json").write_bytes(data)
        return load_config(place)
    (place / SUMS).write_bytes(data)
    return check_sums(place)
