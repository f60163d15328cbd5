"""What a step computes: which rows, which of their tokens, and what of a prompt need not be
computed, because the prefix cache or another row has it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from veneer.generate.runners.runner import Chunk, Runner
from veneer.serve.engine.prefix import PrefixCache, block_hashes
from veneer.serve.engine.request import DRAFTED, Request
from veneer.serve.engine.row import Row
from veneer.serve.engine.step_cost import StepCost

MARGIN = 1.25  # by which a guess must be worth more than it takes: for what is not measured
NOT_DRAFTED = (
    "No tokens are guessed ahead (speculate): the answers would not stay the same, for only the "
    "compiled steps of a CPU give the same numbers whatever is computed beside them."
)
READING_SECONDS = 0.005  # for which a step waits where nothing but blocks on the disk is missing


class Scheduler:
    """Chooses the rows and the chunks of each step; for the engine's thread alone.

    chunk: tokens of prompts in a step, at most, and of a prefix block. drafted: tokens that are
    guessed behind a row's newest one, at most. cached_tokens: how many tokens of prompts were not
    computed.
    """

    def __init__(
        self, runner: Runner, prefixes: PrefixCache, chunk: int, *, drafted: int = 0
    ) -> None:
        self.runner, self.prefixes, self.chunk, self.drafted = runner, prefixes, chunk, drafted
        self.cost = StepCost()
        self.cached_tokens = 0

    def drafts(self, request: Request) -> bool:
        """Return whether tokens of an answer are guessed."""
        return self.drafted > 0 and request.answers and request.sampling.max_new_tokens > 2

    def next_step(self, active: Sequence[Row]) -> list[tuple[Row, Chunk]]:
        """Return the rows that a step computes: all that decode, and then prompts.

        Prompts have `chunk` tokens of it at most; and beside rows that decode, so many that the
        step takes about twice as long as without them.
        """
        decoding, prefilling = self._rows(active)
        if not decoding:
            return self._prompts(prefilling, self.chunk)
        beside = self.cost.beside(len(decoding))
        drafts = self._drafts(decoding, beside)
        chunks = [(row, row.next_token(drafts.get(row, ()))) for row in decoding]
        if self.runner.cut is None:
            return chunks + self._prompts(prefilling, self.chunk)
        left = int(beside) - sum(map(len, drafts.values()))
        left = max(left // self.runner.cut, 1) * self.runner.cut
        return chunks + self._prompts(prefilling, min(left, self.chunk))

    def _rows(self, active: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """Return the rows that can be computed: those that decode, and those that prefill."""
        decoding: list[Row] = []
        prefilling: list[Row] = []
        fetching = False
        for number, row in enumerate(active):
            if row.is_waiting:
                continue
            if not row.computed:
                earlier = active[:number]
                if any(row.shares_prompt(other) and other.prefilling for other in earlier):
                    continue  # that one computes the prompt for both
                if not self._use_prefix(row):
                    fetching = True
                    continue
            (prefilling if row.prefilling else decoding).append(row)
        if fetching and not decoding and not prefilling:
            self.prefixes.wait(READING_SECONDS)
        return decoding, prefilling

    def _prompts(self, rows: Sequence[Row], left: int) -> list[tuple[Row, Chunk]]:
        """Return chunks of prompts, `left` tokens together at most."""
        chunks = []
        for row in rows:
            chunk = row.next_of_prompt(self.chunk, self.chunk)
            if len(chunk.tokens) > left:
                cut = self.runner.cut or self.chunk
                left = left // cut * cut
                if not left:
                    break  # prompts behind it wait with it, or it might wait for ever
                chunk = row.next_of_prompt(self.chunk, left)
            chunks.append((row, chunk))
            left -= len(chunk.tokens)
        return chunks

    def _drafts(self, rows: Sequence[Row], beside: float) -> dict[Row, list[int]]:
        """Return the guessed tokens that make a step give more tokens a second, by row.

        Where rows are computed together, guesses take half as long as the step without them at
        most, so that none waits long for those of others.
        """
        if not self.drafted:
            return {}
        # In the time of a token: the step gives `tokens` in `spent`, and one guess more takes 1.
        tokens, spent = float(len(rows)), beside
        left = int(beside / 2) if len(rows) > 1 else self.drafted
        guesses: list[tuple[float, int, Row, int]] = []
        for number, row in enumerate(rows):
            for token, chance in row.guess(min(self.drafted, left)):
                if chance * spent <= MARGIN * tokens:
                    break
                guesses.append((-chance, number, row, token))
        drafts: dict[Row, list[int]] = {}
        # A row's own guesses stay in order: each has at most the chance of the one before it.
        for chance, _, row, token in sorted(guesses, key=itemgetter(0, 1))[:left]:
            if -chance * spent <= MARGIN * tokens:
                break
            drafts.setdefault(row, []).append(token)
            tokens, spent = tokens - chance, spent + 1
        return drafts

    def give_prompt(self, row: Row, active: Sequence[Row]) -> list[Row]:
        """Give all of a row's prompt to rows that wait for it, and return them."""
        others = [other for other in active if not other.computed and row.shares_prompt(other)]
        for other in others:
            self.runner.copy(row.slot, other.slot, row.computed)
            other.computed = other.cached = row.computed
            self.cached_tokens += other.cached
        return others

    def keep_blocks(self, row: Row, first: int) -> None:
        """Add the blocks of a prompt that are whole since token `first` was computed to the prefix
        cache, if they are new there."""
        last = min(row.computed // self.chunk, len(row.block_hashes))
        for number in range(first // self.chunk, last):
            if self.prefixes.wants(row.block_hashes[number]):
                start = number * self.chunk
                block = self.runner.block(row.slot, start, start + self.chunk)
                self.prefixes.add(row.block_hashes, number, block)

    def _use_prefix(self, row: Row) -> bool:
        """Take the first tokens of a prompt from the prefix cache, as far as it has them, or from
        the adapter; return False while some of them are being read from files."""
        # Where something of each token is asked for, all of them are computed.
        if not row.block_hashes and not row.request.reads_all:
            content = "" if row.adapter is None else row.adapter.content
            row.block_hashes = block_hashes(row.tokens, content, self.chunk, row.acts_from)
            self.prefixes.fetch(row.block_hashes)
        if self.prefixes.is_fetching(row.block_hashes):
            return False
        blocks = self.prefixes.find(row.block_hashes)
        prefix = None if row.adapter is None else row.adapter.prefix
        # What blocks do not hold of a prefix cannot be computed: its virtual tokens are no tokens.
        if prefix is not None and len(blocks) * self.chunk < len(row.virtual):
            self.runner.begin(row.slot, prefix)
            row.computed = len(row.virtual)
            self.keep_blocks(row, 0)
        elif blocks:
            self.runner.fill(row.slot, blocks)
            row.computed = row.cached = len(blocks) * self.chunk
            self.cached_tokens += row.cached
        return True


def most_drafted(runner: Runner, asked: int | None) -> tuple[int, tuple[str, ...]]:
    """Return how many tokens are guessed behind a row's newest one at most, and notices."""
    if runner.is_exact:
        return DRAFTED if asked is None else asked, ()
    return 0, (NOT_DRAFTED,) if asked else ()
