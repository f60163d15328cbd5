"""Chat templates, which come with a base: jinja2 in its sandbox, with limits of time and memory."""

from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.soak_server import CHAT_TEMPLATE

from support.random_adapters import tokenizer
from veneer.data import template_limits
from veneer.data.chat import Chat
from veneer.data.rows import parse_row

MODULES = ("veneer.data.template_limits", "veneer.data.chat")
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, "é"]}}}
ROW = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "cd"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
}
# With those that people have, a fuzzer would wait most of its time.
LIMITS = {"SECONDS": 0.5, "INTERVAL": 0.05, "BYTES": 2**27}


def seeds() -> list[bytes]:
    loops = "{% for m in messages %}{{ m.role ~ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    macro = (
        "{% macro f(x, y=2) -%}{{ x * y }}{%- endmacro %}{% set ns = namespace(a=1) %}{{ f('a') }}"
    )
    hostile = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    inside = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.append(1) }}"
    return [text.encode() for text in (CHAT_TEMPLATE, loops, macro, hostile, inside)]


@cache
def _tokenizer() -> Any:
    return tokenizer()


def read(data: bytes, place: Path) -> None:
    tokens = _tokenizer()
    tokens.chat_template = data.decode("utf-8", "replace")
    row: Any = parse_row(ROW)
    with patch.multiple(template_limits, **LIMITS):
        Chat(tokens).conversation(row)
