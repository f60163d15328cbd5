"""Answers to many requests at once: rows that come and go between two tokens, each with its own
adapter, in one forward pass for all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition, Thread

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from veneer.errors import AdapterError, ConfigError, QueueFull, RequestError, VeneerError
from veneer.models.load import Base
from veneer.serve.engine.adapter_cache import Mix, Resident
from veneer.serve.engine.library import Library
from veneer.serve.engine.prefix import Beginning, PrefixCache
from veneer.serve.engine.request import EngineConfig, Request, Stats, Which
from veneer.serve.engine.row import Answering, Row, Scoring
from veneer.serve.engine.runner import Runner
from veneer.serve.engine.runners import runner_for
from veneer.serve.engine.sampler import choose
from veneer.serve.engine.stream import Stream

LONGEST = 4096  # tokens of a context, where nobody says otherwise


class Engine:
    """One thread that computes; requests come from any.

    `notices` says what a person should know of how the base is computed. The base is the engine's
    while it lives: nothing else may compute with it at the same time.
    """

    def __init__(
        self, base: Base, library: Library | None = None, config: EngineConfig | None = None
    ) -> None:
        self.config = config or EngineConfig()
        self.library = library or Library()
        self.base = base
        self.context = _context(base, self.config.context)
        self.resident = Resident(base.model, self.config.adapter_bytes)
        self.runner: Runner
        self.runner, self.notices = runner_for(base.model, self.config.slots, self.context)
        self._prefixes = PrefixCache(self.config.cache_bytes)
        self._ends = end_tokens(base)
        self._changed = Condition()  # guards what follows
        self._ready: deque[Row] = deque()
        self._loading = 0
        self._closing = False
        self._drained = False
        self._active: list[Row] = []
        self._free = list(range(self.config.slots))[::-1]
        self._counts = dict.fromkeys(
            ("requests", "prompt_tokens", "cached_tokens", "new_tokens", "steps"), 0
        )
        self._loader = ThreadPoolExecutor(1, "veneer-loader")
        self._thread = Thread(target=self._work, name="veneer-engine", daemon=True)
        self._thread.start()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.base.tokenizer

    def submit(self, request: Request) -> Stream:
        """Have a request answered; the stream tells of it.

        Raises RequestError for an unknown adapter or a prompt that leaves no room for an answer,
        QueueFull where too many wait. What goes wrong later, the stream's end says.
        """
        room = self._room(request.tokens, 1)
        stream = Stream(request)
        row = Answering.of(
            stream,
            self._mix(request.adapter),
            self.tokenizer,
            most=min(request.sampling.max_new_tokens, room),
            ends=self._ends,
            device=self.base.model.device,
        )
        self._accept(row)
        return stream

    def score(self, tokens: Sequence[int], adapter: Which = None) -> tuple[float | None, ...]:
        """Return the log probability of each token after those before it; None for the first.

        Raises as `submit` does, and AdapterError for an adapter that cannot act.
        """
        self._room(tokens, 0)
        row = Scoring(tuple(tokens), self._mix(adapter))
        self._accept(row)
        return row.future.result()

    def load(self, name: str) -> None:
        """Make an adapter ready now. Raises AdapterError if it is unknown or does not fit."""
        self.resident.get(((self.library.info(name), 1.0),))

    def close(self, *, drain: bool = True) -> None:
        """Stop, after what was accepted has been answered or, without `drain`, at once."""
        with self._changed:
            self._closing = True
            self._drained = self._drained or not drain
            self._changed.notify_all()
        self._thread.join()
        self._loader.shutdown()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(drain=error[0] is None)

    @property
    def stats(self) -> Stats:
        with self._changed:
            return Stats(
                active=len(self._active),
                waiting=self._waiting,
                slots=self.config.slots,
                cache_bytes=self._prefixes.nbytes,
                resident=self.resident.names(),
                resident_bytes=self.resident.nbytes,
                evicted=self.resident.evicted,
                **self._counts,
            )

    @property
    def _waiting(self) -> int:
        return len(self._ready) + self._loading

    def _room(self, tokens: Sequence[int], new: int) -> int:
        """Return how many tokens an answer may have. Raises RequestError where that is none, and
        for tokens that are none of the model's."""
        if not tokens:
            raise RequestError("The prompt is empty.")
        if len(tokens) + new > self.context:
            raise RequestError(
                f"The prompt has {len(tokens):,} tokens, which leaves no room for an answer in the "
                f"context of {self.context:,}."
            )
        words = self.base.model.config.get_text_config().vocab_size
        if wrong := [token for token in tokens if not 0 <= token < words]:
            raise RequestError(f"{wrong[0]} is no token; there are {words:,}.")
        return self.context - len(tokens)

    def _mix(self, which: Which) -> Mix:
        """Return the versions that names stand for now, with their weights."""
        if which is None:
            return ()
        weights: Mapping[str, float] = {which: 1.0} if isinstance(which, str) else which
        try:
            return tuple((self.library.info(name), float(w)) for name, w in weights.items())
        except AdapterError as error:
            raise RequestError(str(error)) from error

    def _accept(self, row: Row) -> None:
        row.loaded = self.resident.find(row.mix) if row.mix else None
        is_ready = not row.mix or row.loaded is not None
        with self._changed:
            if self._closing:
                raise QueueFull("The engine is closing.")
            if self._waiting >= self.config.queue + len(self._free):
                raise QueueFull(f"{self._waiting} requests wait already; come again later.")
            if is_ready:
                self._ready.append(row)
                self._changed.notify_all()
            else:
                self._loading += 1
                self._loader.submit(self._load, row)

    def _load(self, row: Row) -> None:
        """Make a row's adapters ready; on the loader's thread."""
        error: Exception | None = None
        try:
            row.loaded = self.resident.get(row.mix)
        except Exception as found:
            error = found
        with self._changed:
            self._loading -= 1
            if error is None and not self._drained:
                self._ready.append(row)
            elif error is None:
                self._cancel(row)
            else:
                self._counts["requests"] += 1
                row.fail(error)
            self._changed.notify_all()

    def _work(self) -> None:
        while self._admit():
            active = list(self._active)
            try:
                self._step(active)
            except Exception as error:
                # A step that fails leaves slots that nobody can trust, but the engine goes on.
                for row in active:
                    if row in self._active:
                        self._leave(row)
                        self._counts["requests"] += 1
                        row.fail(error)

    def _admit(self) -> bool:
        """Let rows in where there are slots, waiting for one if there is nothing to do; return
        whether to go on."""
        with self._changed:
            while True:
                if self._drained:
                    self._end_all()
                    return False
                self._ready = deque(row for row in self._ready if not self._given_up(row))
                while self._ready and self._free:
                    row = self._ready.popleft()
                    row.slot = self._free.pop()
                    self._active.append(row)
                if self._active:
                    break
                if self._closing and not self._waiting:
                    return False
                self._changed.wait()
        return True

    def _end_all(self) -> None:
        for row in (*self._active, *self._ready):
            self._cancel(row)
        self._active.clear()
        self._ready.clear()

    def _given_up(self, row: Row) -> bool:
        if row.over:
            self._cancel(row)
        return row.over

    def _cancel(self, row: Row) -> None:
        if isinstance(row, Answering):
            row.finish("cancelled")
        else:
            row.fail(VeneerError("The engine was closed."))
        self._counts["requests"] += 1

    def _step(self, active: Sequence[Row]) -> None:
        """Compute the next token of each row that answers, and a part of the prompts to be read."""
        for row in active:
            if row.over:
                self._leave(row)
                self._cancel(row)
            elif not row.done and row.reading and isinstance(row, Answering):
                self._begin(row)
        rows = [row for row in active if row in self._active]
        answering = [r for r in rows if isinstance(r, Answering) and not r.reading]
        chunks = [row.next_token() for row in answering]
        reading: list[Row] = []
        room = self.config.chunk
        for row in rows:
            if row.reading and room > 0:
                chunk = row.next_chunk(self.config.chunk)
                if len(chunk.tokens) > room and reading:
                    break
                room -= len(chunk.tokens)
                chunks.append(chunk)
                reading.append(row)
        if not chunks:
            return
        logits = self.runner.step(chunks)
        self._counts["steps"] += 1
        sizes = [{"none": 0, "last": 1, "all": len(chunk.tokens)}[chunk.wanted] for chunk in chunks]
        found = dict(zip([*answering, *reading], logits.split(sizes), strict=True))
        for row, chunk in zip([*answering, *reading], chunks, strict=True):
            row.done += len(chunk.tokens)
            if not chunk.answering:
                self._counts["prompt_tokens"] += len(chunk.tokens)
                self._remember(row, chunk.start)
        self._choose({row: one for row, one in found.items() if isinstance(row, Answering)})
        for row, chunk in zip(reading, chunks[len(answering) :], strict=True):
            if isinstance(row, Scoring):
                row.take(found[row], chunk.start)
                if not row.reading:
                    self._leave(row)
                    self._counts["requests"] += 1
                    row.finish()

    def _choose(self, logits: Mapping[Answering, Tensor]) -> None:
        """Let each row that has logits take its next token."""
        rows = [row for row, one in logits.items() if len(one)]
        if not rows:
            return
        choices = choose(torch.cat([logits[row] for row in rows]), [row.chooser for row in rows])
        for row, choice in zip(rows, choices, strict=True):
            self._counts["new_tokens"] += 1
            if (reason := row.take(choice)) is not None:
                # Its slot is free before its end is told, for whoever waits for that.
                self._leave(row)
                self._counts["requests"] += 1
                row.finish(reason)

    def _begin(self, row: Answering) -> None:
        """Take what is known of a prompt from the cache."""
        content = "" if row.loaded is None else row.loaded.content
        row.beginning = Beginning.of(row.tokens, content, self.config.chunk)
        if pieces := self._prefixes.find(row.beginning):
            self.runner.put(row.slot, pieces)
            row.done = row.cached = len(pieces) * self.config.chunk
            self._counts["cached_tokens"] += row.cached

    def _remember(self, row: Row, first: int) -> None:
        """Keep the piece of a prompt that was read from token `first` on, if it is a whole one."""
        number, size = first // self.config.chunk, self.config.chunk
        marks = row.beginning.marks
        if number < len(marks) and self._prefixes.wants(marks[number]):
            piece = self.runner.keep(row.slot, first, first + size)
            self._prefixes.add(row.beginning, number, piece)

    def _leave(self, row: Row) -> None:
        with self._changed:
            if row in self._active:
                self._active.remove(row)
                self.runner.free(row.slot)
                self._free.append(row.slot)


def end_tokens(base: Base) -> frozenset[int]:
    """Return the tokens at which an answer ends, as transformers' `generate` takes them."""
    said = getattr(base.model.generation_config, "eos_token_id", None)
    ends = said if isinstance(said, list) else [said]
    return frozenset(int(end) for end in (*ends, base.tokenizer.eos_token_id) if end is not None)


def _context(base: Base, asked: int | None) -> int:
    own = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    longest = LONGEST if asked is None else asked
    if own is not None and asked is not None and asked > own:
        raise ConfigError(f"context is {asked:,}, but this model's is {own:,}.")
    return longest if own is None else min(own, longest)
