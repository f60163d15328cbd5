"""Does a server hold out under mixed load: no wrong answer, no 5xx, no leak?

    python -m bench.soak [--minutes 60] [--requests-per-second 4] [--model DIRECTORY]
        [--clients 8] [--out FILE]

Starts `veneer serve`, asks each of its questions once while it is alone, and then lets clients draw
from them: chats, streams, streams that are broken off, several choices, tools, JSON schemas,
embeddings, bad requests, adapters that are loaded, replaced and unloaded; beside them a training
job at a time. Every answer that is greedy or has a seed must be the one that it had alone. A line a
minute says what was asked and what the process holds; the exit status is 1 where something was
wrong. Ctrl-C ends it early, with the verdict over what was seen.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from bench.soak_client import PATIENCE, Client, Refused
from bench.soak_jobs import train_now_and_then
from bench.soak_questions import BAD, CHANGING, QUESTIONS, VERSIONS, Question
from bench.soak_server import ADAPTERS, Held, ServerProcess, write_adapters, write_base

LEAK = 50e6  # bytes that memory may grow by after the first fifth of the time
MORE = 4  # descriptors or threads, by which their median may grow meanwhile; sockets, at rest
REST = 60.0  # seconds in which a server may close the sockets of clients that have gone
# Fewer slots than clients, so that some wait; and prefix blocks that soon have to make space, in
# memory and in files: else all that grows with them looks like a leak.
FLAGS = ("--slots", "6", "--prefix-cache-memory", "0.016", "--prefix-cache-size", "0.01")
TOGETHER = 0.03  # seconds in which the clients of a round ask
SHARES = {"ask": 62, "break off": 10, "bad": 12, "replace": 5, "look": 6, "sample": 5}
LOOKS = ("/metrics", "/v1/models", "/health", "/ready", "/api/adapters", "/api/runs", "/")


@dataclass
class Findings:
    """What clients saw, for any thread."""

    statuses: Counter[int] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, status: int, fault: str = "") -> None:
        with self.lock:
            self.done[what] += 1
            self.statuses[status] += 1
            if status >= 500:
                fault = fault or f"{what}: status {status}"
            if fault:
                self.faults.append(f"{time.strftime('%H:%M:%S')} {fault[:600]}")

    @property
    def errors(self) -> int:
        """Responses of 5xx."""
        return sum(count for status, count in self.statuses.items() if status >= 500)


class Load:
    """Clients that draw what to ask, at a rate that is theirs together."""

    def __init__(self, url: str, base: str, rate: float, clients: int) -> None:
        self.url, self.base, self.round = url, base, clients / rate
        self.findings, self.over = Findings(), threading.Event()
        self.expected: dict[tuple[str, str], Any] = {}
        self.fixed = (base, *(name for name in ADAPTERS if name not in VERSIONS))
        self.models = (*self.fixed, CHANGING)
        self._threads = [
            threading.Thread(target=self._guarded, args=(self._client, number), daemon=True)
            for number in range(clients)
        ]

    def learn_answers(self) -> None:
        """Ask every question of every model while nobody else does."""
        client = Client(self.url)
        for question in QUESTIONS:
            for model in self.fixed:
                self.expected[question.name, model] = client.ask(question, model)
        for version in VERSIONS:
            client.load(CHANGING, version)
            for question in QUESTIONS:
                self.expected[question.name, version] = client.ask(question, CHANGING)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def beside(self, work: Any) -> None:
        """Let `work(url, base, findings, over)` go on beside the clients."""
        arguments = (self.url, self.base, self.findings, self.over)
        thread = threading.Thread(target=self._guarded, args=(work, *arguments), daemon=True)
        self._threads.append(thread)

    def end(self) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join(PATIENCE)
            if thread.is_alive():
                self.findings.add("end", 0, "a client waits for an answer that does not come")

    def _guarded(self, work: Any, *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            self.findings.add("client", 0, f"a client broke: {error!r}")

    def _client(self, number: int) -> None:
        draw, client = random.Random(number), Client(self.url)
        actions = {
            "ask": self._ask,
            "break off": self._break_off,
            "bad": self._bad,
            "replace": self._replace,
            "look": self._look,
            "sample": self._sample,
        }
        while not self.over.wait(self._until_next_round() + TOGETHER * draw.random()):
            kind = draw.choices(list(SHARES), list(SHARES.values()))[0]
            try:
                actions[kind](client, draw)
            except Refused as refused:
                # A server may be full; all else that a right request gets is a fault.
                fault = "" if refused.status == 429 else f"{kind}: {refused}"
                self.findings.add(kind, refused.status, fault)
            except OSError as error:
                self.findings.add(kind, 0, f"{kind}: {error!r}")

    def _until_next_round(self) -> float:
        """Return the seconds until all clients ask again: together, so that rows share steps."""
        return self.round - time.monotonic() % self.round

    def _ask(self, client: Client, draw: random.Random) -> None:
        question, model = draw.choice(QUESTIONS), draw.choice(self.models)
        stream = question.can_stream and draw.random() < 0.5
        answer = client.ask(question, model, stream=stream)
        names = VERSIONS if model == CHANGING else (model,)
        right = any(answer == self.expected[question.name, name] for name in names)
        fault = "" if right else f"{question.name} by {model}, stream {stream}: {answer!r}"
        self.findings.add(f"{question.name}{' (stream)' * stream}", 200, fault)

    def _sample(self, client: Client, draw: random.Random) -> None:
        """Ask what nobody has asked, which fills the prefix cache."""
        text = " ".join(str(draw.random()) for _ in range(draw.randrange(1, 40)))
        body = {"max_tokens": draw.randrange(1, 60), "temperature": 1.0, "top_p": 0.9}
        client.ask(Question("sample", body, text=text), draw.choice(self.models))
        self.findings.add("sample", 200)

    def _break_off(self, client: Client, draw: random.Random) -> None:
        question = draw.choice([each for each in QUESTIONS if each.can_stream])
        client.break_off(question, draw.choice(self.models), after=draw.randrange(4))
        self.findings.add("break off", 200)

    def _bad(self, client: Client, draw: random.Random) -> None:
        name, send, expected = draw.choice(BAD)
        status = send(client, self.base)
        fault = "" if status in expected else f"{name} was answered by {status}"
        self.findings.add(f"bad: {name}", status, fault)

    def _replace(self, client: Client, draw: random.Random) -> None:
        client.load(CHANGING, draw.choice(VERSIONS))
        extra = f"extra-{draw.randrange(10**6)}"
        client.load(extra, draw.choice(VERSIONS))
        client.ask(draw.choice(QUESTIONS), extra)
        client.unload(extra)
        self.findings.add("replace", 200)

    def _look(self, client: Client, draw: random.Random) -> None:
        self.findings.add("look", client.get(draw.choice(LOOKS))[0])


@dataclass(frozen=True)
class Sample:
    """What the server held at a moment, and the bytes of its caches among its memory."""

    seconds: float
    held: Held
    cached: float

    @property
    def memory(self) -> float:
        """Bytes beside the caches, which are meant to grow up to their limits."""
        return self.held.memory - self.cached


def watch(server: ServerProcess, load: Load, minutes: float, out: TextIO) -> list[Sample]:
    """Take samples until the time is over, and write a line a minute."""
    began, samples, shown = time.monotonic(), list[Sample](), 0
    names = ("minute", "requests", "429", "5xx", "faults")
    held = ("MB", "of which caches", "descriptors", "threads", "sockets")
    print(*names, *held, sep=" | ", file=out, flush=True)
    while (passed := time.monotonic() - began) < 60 * minutes:
        if server.process.poll() is not None:
            load.findings.add("server", 0, f"the server ended with {server.process.returncode}")
            break
        samples.append(Sample(passed, server.held(), Client(load.url).cache_bytes()))
        if passed >= 60 * shown or minutes < 2:
            shown += 1
            findings, last = load.findings, samples[-1]
            counts = (sum(findings.done.values()), findings.statuses[429], findings.errors)
            sizes = (f"{last.held.memory / 1e6:.1f}", f"{last.cached / 1e6:.1f}")
            numbers = (*counts, len(findings.faults), *sizes)
            open_now = (last.held.others, last.held.threads, last.held.sockets)
            print(
                *(f"{passed / 60:.1f}", *numbers, *open_now),
                sep=" | ",
                file=out,
                flush=True,
            )
        try:
            time.sleep(min(5.0, 6 * minutes))
        except KeyboardInterrupt:
            print(f"ended after {passed / 60:.1f} of {minutes:g} minutes", file=out)
            break
    return samples


def wait_for_rest(server: ServerProcess, before: int, findings: Findings, out: TextIO) -> None:
    """Compare a server's sockets without clients with those that it had before them."""
    deadline = time.monotonic() + REST
    while (left := server.held().sockets) > before and time.monotonic() < deadline:
        time.sleep(0.5)
    print(f"sockets at rest: {before}, at the end {left}", file=out)
    if left > before + MORE:
        findings.add("rest", 0, f"{left} sockets are open, and no client is there")


def verdict(samples: list[Sample], findings: Findings, failures: int, out: TextIO) -> bool:
    """Write what was done and what was wrong, and return whether nothing was.

    failures: tracebacks in the server's log.
    """
    end = samples[-1].seconds
    early = [each for each in samples if 0.2 * end <= each.seconds <= 0.35 * end] or samples[:1]
    late = [each for each in samples if each.seconds >= 0.85 * end]
    growth = median(x.memory for x in late) - median(x.memory for x in early)
    print("", file=out)
    for what, count in sorted(findings.done.items()):
        print(f"{count:7}  {what}", file=out)
    print(f"statuses: {dict(sorted(findings.statuses.items()))}", file=out)
    print(f"memory beside the caches grew by {growth / 1e6:.1f} MB", file=out)
    good = not findings.faults and growth <= LEAK and not failures
    for what, name in (("descriptors beside sockets", "others"), ("threads", "threads")):
        first, last = (median(getattr(x.held, name) for x in each) for each in (early, late))
        good = good and last - first <= MORE
        print(f"{what}: {first:g}, at the end {last:g}", file=out)
    print(f"tracebacks in the server's log: {failures}", file=out)
    for fault in findings.faults[:40]:
        print(f"FAULT {fault}", file=out)
    print("held out" if good else "DID NOT HOLD OUT", file=out, flush=True)
    return good


def soak(place: Path, model: str | None, options: argparse.Namespace, out: TextIO) -> bool:
    """Run all of it below `place`."""
    base = model or str(place / "base")
    if model is None:
        write_base(place / "base")
    write_adapters(base, place / "adapters")
    server = ServerProcess(base, place, *FLAGS, "--prefix-cache", str(place / "prefixes"))
    try:
        name = Client(server.url).base()
        load = Load(server.url, name, options.requests_per_second, options.clients)
        load.learn_answers()
        at_rest = server.held().sockets
        load.beside(train_now_and_then)
        load.start()
        samples = watch(server, load, options.minutes, out)
        load.end()
        if server.process.poll() is None:
            wait_for_rest(server, at_rest, load.findings, out)
            numbers = Client(server.url).numbers()
            steps, new = (numbers[f"veneer_engine_{name}"] for name in ("steps", "new_tokens"))
            print(f"{new:g} new tokens in {steps:g} steps", file=out)
    finally:
        status = server.stop()
    if status:
        load.findings.add("server", 0, f"the server exited with {status}")
    return verdict(samples, load.findings, server.failures(), out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--requests-per-second", type=float, default=4.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--model", help="a base; a small random one unless given")
    parser.add_argument("--out", type=Path, help="a file for the table")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        if options.out is None:
            return int(not soak(Path(place), options.model, options, sys.stdout))
        with options.out.open("w") as out:
            return int(not soak(Path(place), options.model, options, out))


if __name__ == "__main__":
    sys.exit(main())
