"""What do guessed tokens save, and what do they cost where they are wrong? The engine with and
without them, interleaved in one run, over texts that repeat their prompt and over others; answers
must be the same. With --cpu times are the processor's, for a machine that others use too: take one
thread then (OMP_NUM_THREADS=1), as threads that wait for each other count."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from json import dumps

import torch

import veneer
from veneer.generate.sampling import Sampling
from veneer.kernels.heap import kept_heap
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.request import Answer, EngineConfig, Grammar, Request

CODE = """def mean(values):
    total = 0
    for value in values:
        total = total + value
    return total / len(values)


def variance(values):
    average = mean(values)
    total = 0
    for value in values:
        total = total + (value - average) * (value - average)
    return total / len(values)
"""
LETTER = (
    "Dear Ms Okafor, thank you for your letter of the third of May. The two tables that you "
    "ordered, of oiled oak with rounded corners, left our workshop on Monday, and should reach you "
    "within a week. Should one of them be scratched, please keep the boxes, and write to us with a "
    "picture of the damage; we will send a new one at once. The chairs will follow in June."
)
REPEATING = {
    "a letter, copied": f"Repeat this letter word for word:\n\n{LETTER}",
    "code, one name changed": f"Rename the function mean to average_of in this code:\n\n{CODE}",
    "sentences, as a list": f"List the sentences of this letter, with numbers:\n\n{LETTER}",
}
SOUPS = "Give me three soups, each with its name, its minutes and how difficult it is."
SCHEMA = {
    "type": "array",
    "minItems": 3,
    "maxItems": 3,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "preparation_minutes": {"type": "integer", "maximum": 99},
            "difficulty": {"enum": ["easy", "moderate", "hard"]},
        },
        "required": ["name", "preparation_minutes", "difficulty"],
        "additionalProperties": False,
    },
}
LONG = 1500  # tokens of a prompt that comes while an answer runs
OTHER = {
    "a story": "Tell me a story of a lighthouse keeper who finds a map.",
    "an explanation": "Why is the sky blue, and why is it red in the evening?",
    "a recipe": "How do I make a soup of leeks and potatoes?",
    "a poem, drawn": "Write a poem about rain in a harbour.",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--bits", type=int, choices=(4, 8))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--speculate", type=int, default=16)
    parser.add_argument("--cpu", action="store_true", help="time of the processor")
    asked = parser.parse_args()
    base = veneer.load_base(asked.model, dtype=asked.dtype, bits=asked.bits)

    def request(question: str, *, drawn: bool) -> Request:
        text = [{"role": "user", "content": question}]
        ids = base.tokenizer.apply_chat_template(
            text, add_generation_prompt=True, return_dict=False
        )
        return Request(
            tuple(ids), None, Sampling(asked.new, temperature=0.8 if drawn else 0.0, seed=1)
        )

    soups = replace(request(SOUPS, drawn=False), grammar=Grammar("json_schema", dumps(SCHEMA)))
    texts = {**REPEATING, **OTHER}
    one = {what: [request(text, drawn="drawn" in what)] for what, text in texts.items()}
    cases = {
        **one,
        "JSON by a schema": [soups],
        "all but the JSON, together": [each for rows in one.values() for each in rows],
    }
    with kept_heap(), torch.inference_mode():
        engines = [
            Engine(base, config=EngineConfig(slots=8, speculate=most))
            for most in (0, asked.speculate)
        ]
        clock = time.process_time if asked.cpu else time.perf_counter
        print("| answers | ms a token | with guesses | | guesses, right | steps |")
        print("|---|---:|---:|---|---|---|")
        for what, requests in cases.items():
            compare(what, engines, requests, asked.rounds, clock)
        reading = engines[1]._scheduler.cost.reading
        print(f"\nReading the weights takes as long as {reading:.1f} tokens.")
        delays(engines[0], request(OTHER["a story"], drawn=False), clock)
        for engine in engines:
            engine.close()


def compare(
    what: str,
    engines: Sequence[Engine],
    requests: Sequence[Request],
    rounds: int,
    clock: Callable[[], float],
) -> None:
    times: list[list[float]] = [[], []]
    answers: list[list[Answer]] = [[], []]
    before = engines[1].stats
    for n in range(rounds + 1):
        for number in (0, 1) if n % 2 else (1, 0):
            spent, answers[number] = answer(engines[number], requests, clock)
            if n:  # the first reads prompts, and warms up
                times[number].append(spent)
    same = [[a.tokens for a in each] for each in answers]
    assert same[0] == same[1], f"{what}: other answers"
    tokens = sum(a.new_tokens for a in answers[0])
    without, with_guesses = (statistics.median(each) / tokens for each in times)
    stats, runs = engines[1].stats, rounds + 1
    print(
        f"| {what} | {without:.2f} | {with_guesses:.2f} | {without / with_guesses:.2f} × as fast | "
        f"{(stats.drafted_tokens - before.drafted_tokens) / runs:.0f}, "
        f"{(stats.accepted_tokens - before.accepted_tokens) / runs:.0f} of {tokens} | "
        f"{(stats.steps - before.steps) / runs:.0f} |",
        flush=True,
    )


def delays(engine: Engine, asked: Request, clock: Callable[[], float]) -> None:
    """Measure what a token of a running answer waits for, with a long prompt beside it or none."""
    print("\n| a token of an answer | median ms | longest of 20 |\n|---|---:|---:|")
    cut = engine.runner.cut
    draw = torch.Generator().manual_seed(1)
    for what, beside, own in (
        ("alone", False, cut),
        (f"beside a prompt of {LONG:,} tokens", True, cut),
        ("the same, 64 of them a step", True, None),
    ):
        gaps = []
        engine.runner.cut = own  # type: ignore[misc]
        stream = engine.submit(replace(asked, sampling=Sampling(30)))
        pieces = iter(stream)
        for _ in range(4):
            next(pieces)
        if beside:
            tokens = torch.randint(100, 20000, (LONG,), generator=draw).tolist()
            prompt = engine.submit(Request(tuple(tokens), None, Sampling(1)))
        before = clock()
        for _ in range(20):
            next(pieces)
            gaps.append((clock() - before) * 1e3)
            before = clock()
        for _ in pieces:
            pass
        if beside:
            prompt.result()  # nothing of it is left for the next measurement
        print(f"| {what} | {statistics.median(gaps[1:]):.1f} | {max(gaps[1:]):.1f} |", flush=True)
    engine.runner.cut = cut  # type: ignore[misc]


def answer(
    engine: Engine, requests: Sequence[Request], clock: Callable[[], float]
) -> tuple[float, list[Answer]]:
    """Return the milliseconds that answers took, and the answers."""
    start = clock()
    streams = [engine.submit(request) for request in requests]
    answers = [stream.result() for stream in streams]
    return (clock() - start) * 1e3, answers


if __name__ == "__main__":
    main()
