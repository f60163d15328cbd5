"""The rows that engines train on: the same tokens, in the same steps, for each of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from veneer.data.encode import UNLABELLED, Encoder, Example, encode_rows
from veneer.data.load import load_examples
from veneer.data.problems import Located, Place
from veneer.data.rows import Row, parse_row

# Rows and tokens of each step of random tokens.
RANDOM = {
    "dense": (8, 256),
    "half": (4, 256),
    "long": (1, 2048),
    "longer": (1, 8192),
    "short": (1, 64),
}
WORKLOADS = (*RANDOM, "sft")
ROWS = 240  # questions and answers, of which a tenth is held out

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


@dataclass(frozen=True)
class Workload:
    """`steps` of row indices; `held_out` rows measure what was learnt."""

    name: str
    examples: list[Example]
    steps: list[list[int]]
    held_out: list[Example]

    def tokens(self, step: int) -> int:
        """Return the real tokens of a step."""
        return sum(len(self.examples[i].tokens) for i in self.steps[step])


def workload(
    name: str, tokenizer: PreTrainedTokenizerBase, *, steps: int, data: Path | None
) -> Workload:
    """Return rows of random tokens, of which every label counts, or `sft` (answers alone)."""
    if name in RANDOM:
        rows, length = RANDOM[name]
        examples = random_rows(rows * steps, length, tokenizer.vocab_size)
        return Workload(name, examples, _steps(range(rows * steps), rows), [])
    examples = _question_answers(tokenizer) if data is None else load_examples(data, tokenizer)[0]
    order = np.random.default_rng(0).permutation(len(examples)).tolist()
    held_out, trained = order[: len(order) // 10], order[len(order) // 10 :]
    return Workload(
        name, examples, _steps(trained, 8)[: steps or None], [examples[i] for i in held_out]
    )


def random_rows(rows: int, length: int, vocab: int) -> list[Example]:
    """Return rows of random tokens, of which all but the first are learnt."""
    ids = np.random.default_rng(0).integers(5, vocab, (rows, length)).tolist()
    return [Example(row, [UNLABELLED, *row[1:]], "random", 0) for row in ids]


def _steps(rows, size: int) -> list[list[int]]:
    rows = list(rows)
    return [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]


def _question_answers(tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Return questions and answers of long-tailed lengths: one answer, or several in a row."""
    import cuisine

    draw = np.random.default_rng(1)
    facts = cuisine.training_rows()
    rows: list[Located[Row]] = []
    for n in range(ROWS):
        # Log-normal, as lengths of real answers are: most are short, a few are very long.
        count = int(min(40, 1 + draw.lognormal(0.6, 1.0)))
        picked = [facts[i] for i in draw.integers(0, len(facts), count)]
        row = {
            "prompt": picked[0]["prompt"],
            "completion": " ".join(fact["completion"] for fact in picked),
        }
        rows.append(Located(parse_row(row), Place("qa", n)))
    return encode_rows(Encoder(tokenizer, max_length=1024), rows)[0]
