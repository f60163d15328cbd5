"""What a step computes: which rows, which chunks of their prompts, and what of a prompt need not be
computed, because the prefix cache or another row has it."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.serve.engine.prefix import PrefixCache, block_hashes
from veneer.serve.engine.row import Row
from veneer.serve.engine.runner import Chunk, Runner

READING_SECONDS = 0.005  # for which a step waits where nothing but blocks on the disk is missing


class Scheduler:
    """Chooses the rows and the chunks of each step; for the engine's thread alone.

    chunk: tokens of prompts in a step, at most, and of a prefix block. cached_tokens: how many
    tokens of prompts were not computed.
    """

    def __init__(self, runner: Runner, prefixes: PrefixCache, chunk: int) -> None:
        self.runner, self.prefixes, self.chunk = runner, prefixes, chunk
        self.cached_tokens = 0

    def next_step(self, active: Sequence[Row]) -> list[tuple[Row, Chunk]]:
        """Return the rows that a step computes: all that decode, and then prompts, of which it
        takes `chunk` tokens at most."""
        left = self.chunk
        decoding, prefilling, fetching = [], [], False
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
            if not row.prefilling:
                decoding.append((row, row.next_chunk(self.chunk)))
            elif left:
                chunk = row.next_chunk(self.chunk)
                if len(chunk.tokens) <= left:
                    prefilling.append((row, chunk))
                    left -= len(chunk.tokens)
                else:
                    left = 0  # prompts behind it wait with it, or it might wait for ever
        if fetching and not decoding and not prefilling:
            self.prefixes.wait(READING_SECONDS)
        return decoding + prefilling

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
        # Where all logits of the prompt are needed, all of it is computed.
        if not row.block_hashes and not row.request.prompt_logprobs:
            content = "" if row.adapter is None else row.adapter.content
            row.block_hashes = block_hashes(row.tokens, content, self.chunk, row.acts_from)
            self.prefixes.fetch(row.block_hashes)
        if self.prefixes.is_fetching(row.block_hashes):
            return False
        if blocks := self.prefixes.find(row.block_hashes):
            self.runner.fill(row.slot, blocks)
            row.computed = row.cached = len(blocks) * self.chunk
            self.cached_tokens += row.cached
        elif row.adapter is not None and row.adapter.prefix is not None:
            self.runner.begin(row.slot, row.adapter.prefix)
            row.computed = len(row.virtual)
            self.keep_blocks(row, 0)
        return True
