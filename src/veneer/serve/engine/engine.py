"""Continuous batching: rows come and go between two tokens, each with an adapter of its own, and
one forward pass computes all of them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition, Thread
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from veneer.errors import AdapterError, QueueFull, VeneerError
from veneer.generate.runners.choice import runner_for
from veneer.generate.runners.slots import SlotRunner
from veneer.kernels.transfer import OnTheWay
from veneer.models.device import use_device
from veneer.models.end_tokens import end_tokens
from veneer.models.load import Base
from veneer.serve.engine.adapter_cache import AdapterCache
from veneer.serve.engine.admission import check, mix_of
from veneer.serve.engine.detokenizer import Detokenizer
from veneer.serve.engine.embedder import Embedder
from veneer.serve.engine.identity import identity_of_blocks
from veneer.serve.engine.issued import Draft, Issued, Scores
from veneer.serve.engine.library import Library, unmixed
from veneer.serve.engine.prefix import PrefixCache
from veneer.serve.engine.prefix_files import PrefixFiles
from veneer.serve.engine.request import EngineConfig, Reason, Request, Stats, Token, Which
from veneer.serve.engine.row import Row
from veneer.serve.engine.sampler import Drawn, Sampler, sample
from veneer.serve.engine.scheduler import Scheduler, most_drafted
from veneer.serve.engine.stream import Stream
from veneer.serve.engine.vocabulary import Vocabularies, Vocabulary

log = logging.getLogger("veneer.serve")

COUNTED = (  # of Stats
    *("requests", "prompt_tokens", "new_tokens", "steps"),
    *("drafted_tokens", "accepted_tokens"),
)


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
        self.context = self.config.context_of(base.model.config.get_text_config())
        memory = self.config.adapter_bytes
        self.adapters = AdapterCache(base.model, memory, base.tokenizer, self.context)
        self.vocabularies = Vocabularies(self.adapters.fit, base.tokenizer)
        self.runner, self.notices = runner_for(base.model, self.config.slots, self.context)
        self._embedder = Embedder(base.model)
        prefixes = PrefixCache(self.config.cache_bytes, self._block_files())
        drafted, notices = most_drafted(self.runner, self.config.speculate)
        self.notices += notices
        self._scheduler = Scheduler(self.runner, prefixes, self.config.chunk, drafted=drafted)
        self._ends = frozenset({*end_tokens(base.model), base.tokenizer.eos_token_id} - {None})
        self._changed = Condition()  # guards what follows
        self._ready: deque[Row] = deque()  # rows that wait for a slot
        self._loading = 0  # rows that wait for their adapter
        self._closing = False
        self._cut = False  # closing without answering what is left
        self._active: list[Row] = []
        self._issued: Issued | None = None  # a step whose results have not been read yet
        self._free = list(range(self.config.slots))[::-1]
        self._counts = dict.fromkeys(COUNTED, 0)
        self._loader = ThreadPoolExecutor(1, "veneer-loader")
        self._thread = Thread(target=self._work, name="veneer-engine", daemon=True)
        self._thread.start()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.base.tokenizer

    def submit(self, request: Request) -> Stream:
        """Have a request answered; its answer comes through the stream.

        Raises RequestError for an unknown adapter or a prompt that is too long, AdapterError for an
        adapter that the library refuses, QueueFull where too many requests wait. Errors that come
        later end the stream.
        """
        mix = mix_of(self.library, request.adapter)
        own = self.vocabularies.of(mix)
        context = self.context - own.virtual
        check(request, context=context, vocab=own.size)
        stream = Stream(request)
        row = Row(
            stream,
            mix,
            self._sampler(request, own),
            Detokenizer(own.tokenizer, request.stop, special=request.special),
            most=min(request.sampling.max_new_tokens, context - len(request.tokens)),
            ends=self._ends,
            virtual=own.virtual_ids,
            drafts=self._scheduler.drafts(request),
        )
        self._accept(row)
        return stream

    def score(self, tokens: Sequence[int], adapter: Which = None) -> tuple[float | None, ...]:
        """Return the log probability of each token after those before it; None for the first.

        Raises as `submit` does, and AdapterError for an adapter that cannot act.
        """
        request = Request(tuple(tokens), adapter, prompt_logprobs=True)
        answer = self.submit(request).result()
        if answer.error is not None:
            raise answer.error
        if answer.reason == "cancelled":
            raise VeneerError("The engine was closed.")
        return answer.prompt_logprobs

    def vocabulary(self, which: Which) -> Vocabulary:
        """Return the tokens that adapters read and answer in. Raises as `submit` does."""
        return self.vocabularies.of(mix_of(self.library, which))

    def load(self, name: str) -> None:
        """Load an adapter now, and drop those that were replaced or removed. Raises AdapterError if
        it is unknown or does not fit."""
        self.adapters.get(((self.library.info(name), 1.0),))
        versions = {entry.version for entry in self.library.entries()}
        self.adapters.drop_gone(versions)
        self.vocabularies.drop_gone(versions)

    def refuse_unservable(self, since: int = 0) -> dict[str, str]:
        """Let the library refuse adapters whose settings or shapes cannot be served, and return why
        by name. since: a version up to which all were looked at before."""
        for entry in self.library.entries():
            is_new = entry.version > since
            if is_new and not entry.refusal and (why := self.adapters.fit.why_not(entry)):
                self.library.refuse(entry, why)
        return {entry.name: entry.refusal for entry in self.library.entries() if entry.refusal}

    def close(self, *, drain: bool = True) -> None:
        """Stop, after what was accepted has been answered or, without `drain`, at once."""
        with self._changed:
            self._closing = True
            self._cut = self._cut or not drain
            self._changed.notify_all()
        self._thread.join()
        self._loader.shutdown()
        self._scheduler.prefixes.close()

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
                cached_tokens=self._scheduler.cached_tokens,
                cache_bytes=self._scheduler.prefixes.nbytes,
                stored_bytes=self._scheduler.prefixes.stored_bytes,
                resident=self.adapters.names(),
                resident_bytes=self.adapters.nbytes,
                evicted=self.adapters.evicted,
                **self._counts,
            )

    def _block_files(self) -> PrefixFiles | None:
        config, device = self.config, self.base.model.device
        if config.cache_directory is None:
            return None
        identity = identity_of_blocks(self.base, self.runner, config.chunk)
        return PrefixFiles(config.cache_directory, config.cache_file_bytes, identity, device)

    # ---- on the threads of callers, and on the loader's ----

    @property
    def _waiting(self) -> int:
        return len(self._ready) + self._loading

    def _sampler(self, request: Request, own: Vocabulary) -> Sampler:
        matcher = None if request.grammar is None else own.grammars.matcher(request.grammar)
        device = self.base.model.device
        return Sampler.of(request, device, ends=self._ends, matcher=matcher, size=own.size)

    def _accept(self, row: Row) -> None:
        row.adapter = self.adapters.find(row.mix) if row.mix else None
        is_ready = not row.mix or row.adapter is not None
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
        """Load a row's adapters; on the loader's thread."""
        error = None
        try:
            row.adapter = self.adapters.get(row.mix)
        except Exception as caught:
            error = caught
            # What cannot be mixed can be served alone.
            if isinstance(error, AdapterError) and (entry := unmixed(row.mix)) is not None:
                self.library.refuse(entry, str(error))
                log.warning("%s", error)
        with self._changed:
            self._loading -= 1
            if error is not None:
                self._end(row, "error", error)
            elif self._cut:
                self._end(row, "cancelled")
            else:
                self._ready.append(row)
            self._changed.notify_all()

    # ---- on the engine's own thread ----

    def _work(self) -> None:
        try:
            use_device(self.base.model.device)
            while self._admit():
                try:
                    self._step(list(self._active))
                except Exception as error:
                    # Slots cannot be trusted after a step that failed, but the engine goes on.
                    self._issued = None
                    for row in list(self._active):
                        self._end(row, "error", error)
        except Exception as error:
            log.critical("The engine ended; no request is answered any more.", exc_info=error)
            with self._changed:
                self._closing = self._cut = True
                rows = [*self._active, *self._ready]
            for row in rows:
                row.finish("error", error)

    def _admit(self) -> bool:
        """Give free slots to waiting rows, waiting for one if there is nothing to do; return
        whether to go on."""
        with self._changed:
            while True:
                for row in [row for row in self._ready if self._cut or row.stream.cancelled]:
                    self._ready.remove(row)
                    self._end(row, "cancelled")
                if self._cut:
                    for row in list(self._active):
                        self._end(row, "cancelled")
                    return False
                while self._ready and self._free:
                    row = self._ready.popleft()
                    row.slot = self._free.pop()
                    self._active.append(row)
                if self._active:
                    return True
                if self._closing and not self._waiting:
                    return False
                self._changed.wait()

    def _step(self, active: Sequence[Row]) -> None:
        """Compute the next token of each decoding row, and a chunk of the prompts of others. On a
        device that is not to wait, take the results of the step before, while this one runs."""
        cancelled = [row for row in active if row.stream.cancelled]
        for row in cancelled:
            self._end(row, "cancelled")
        active = [row for row in active if row not in cancelled]
        embedded: list[Row] = []
        if self.runner.hidden is None:
            embedded = [row for row in active if row.request.embedding]
            self._embed(embedded)
        issued = self._issue([row for row in active if row not in embedded])
        if isinstance(self.runner, SlotRunner):
            issued, self._issued = self._issued, issued
        if issued is not None:
            self._take(issued)

    def _embed(self, rows: Sequence[Row]) -> None:
        """Compute a chunk of the first text that is to be embedded."""
        for row in rows[:1]:
            if self._embedder.advance(row, self.config.chunk):
                self._counts["prompt_tokens"] += row.computed
                self._end(row, "length")

    def _issue(self, active: Sequence[Row]) -> Issued | None:
        """Have a step computed."""
        scheduled = self._scheduler.next_step(active)
        if not scheduled:
            return None
        begun = perf_counter()
        logits = self.runner.step([chunk for _, chunk in scheduled])
        if self.runner.cut is not None:
            tokens = sum(len(chunk.tokens) for _, chunk in scheduled)
            self._scheduler.cost.add(tokens, perf_counter() - begun)
        self._counts["steps"] += 1
        rows: list[Row] = []
        to_sample: list[Tensor] = []
        drafts: list[Draft] = []
        scores: list[Scores] = []
        split = logits.split([chunk.logits for _, chunk in scheduled])
        for (row, chunk), own in zip(scheduled, split, strict=True):
            draft: Draft = ()
            if chunk.decoding:
                row.computed += 1
                draft = list(zip(chunk.tokens[1:], own[1:], strict=True))
                self._counts["drafted_tokens"] += len(draft)
            else:
                row.computed += len(chunk.tokens)
                self._counts["prompt_tokens"] += len(chunk.tokens)
                self._scheduler.keep_blocks(row, chunk.start)
            if row.request.embedding:
                assert self.runner.hidden is not None
                row.take_hidden(self.runner.hidden[row.slot], chunk.start)
                if not row.prefilling:
                    self._end(row, "length")
            elif row.request.prompt_logprobs:
                coming = OnTheWay(*row.scores(own, chunk.start))
                scores.append(Scores(row, coming, is_last=not row.prefilling))
            elif chunk.logits:
                # Rows that wait for this prompt have it now, and draw from the same logits.
                others = [] if chunk.decoding else self._scheduler.give_prompt(row, self._active)
                for each in (row, *others):
                    rows.append(each)
                    to_sample.append(own[:1])
                    drafts.append(draft)
                    each.drawn += 1
        drawn = None
        if rows:
            drawn = Drawn(torch.cat(to_sample), [row.sampler for row in rows])  # (rows, vocab)
            if isinstance(self.runner, SlotRunner):
                self.runner.take([row.slot for row in rows], drawn.ids)
        return Issued(rows, drawn, drafts, scores)

    def _take(self, issued: Issued) -> None:
        """Give rows what a step computed for them, unless they ended meanwhile."""
        for each in issued.scores:
            if each.row in self._active:
                each.row.take_scores(*each.coming.arrived())
                if each.is_last:
                    self._end(each.row, "length")
        tokens = [] if issued.drawn is None else issued.drawn.tokens()
        for row, token, draft in zip(issued.rows, tokens, issued.drafts, strict=True):
            if row in self._active and self._give(row, token):
                self._go_on(row, draft)

    def _go_on(self, row: Row, draft: Draft) -> None:
        """Give a row the tokens behind those of its draft, up to the first that is another."""
        for guess, logits in draft:
            if row.last != guess:
                return
            row.computed += 1
            row.drawn += 1
            self._counts["accepted_tokens"] += 1
            (token,) = sample(logits[None], [row.sampler])
            if not self._give(row, token):
                return

    def _give(self, row: Row, token: Token | Exception) -> bool:
        """Give a row a token, or what keeps it from having one; return whether it goes on."""
        if isinstance(token, Exception):
            self._end(row, "error", token)
            return False
        self._counts["new_tokens"] += 1
        try:
            reason, error = row.take(token), None
        except Exception as caught:  # in its text, which is no other row's
            reason, error = "error", caught
        if reason is not None:
            self._end(row, reason, error)
        return reason is None

    def _end(self, row: Row, reason: Reason, error: Exception | None = None) -> None:
        """End an answer. Its slot is free before the last piece is sent, so that whoever waits for
        the piece finds it free."""
        try:
            with self._changed:
                self._counts["requests"] += 1
                if row in self._active:
                    self._active.remove(row)
                    self.runner.free(row.slot)
                    self._free.append(row.slot)
            row.finish(reason, error)
        except Exception as caught:  # whoever waits for the last piece must not wait for ever
            row.finish("error", caught)
