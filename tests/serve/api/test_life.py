"""`veneer serve` as a person starts it: a process, a crowd, and a proper end."""

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import pytest
import torch

import veneer
from support import warm
from support.random_adapters import shake
from support.server import call, chat, post
from support.waiting import eventually
from veneer.cli.app import run
from veneer.models import minigpt

CROWD = 500


@dataclass
class Process:
    """A server in a process of its own."""

    process: subprocess.Popen
    url: str

    def memory(self) -> int:
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGESIZE")

    def stats(self) -> dict[str, float]:
        lines = call(self.url, "/metrics")[2].splitlines()
        return {n: float(v) for n, v in (x.split() for x in lines if x[0] != "#")}


def start(model: Path, *arguments: str, python: str) -> Process:
    process = subprocess.Popen(
        [python, "-m", "veneer", "serve", str(model), "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200", "PYTHONFAULTHANDLER": "1"},
    )
    output = ""
    for line in process.stdout:
        output += line
        if url := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    else:
        raise AssertionError(output + process.stderr.read())
    served = Process(process, url.group())
    eventually(lambda: call(served.url, "/ready")[0], lambda status: status == 200)
    return served


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A MiniGPT that says nothing sensible, and always the same."""
    tokenizer = minigpt.wrap_tokenizer(
        minigpt.train_tokenizer(["Honey is sweet. What is it?"], 300)
    )
    torch.manual_seed(0)
    config = minigpt.MiniGPTConfig(vocab_size=len(tokenizer), embed_dim=32, num_layers=2)
    place = tmp_path_factory.mktemp("served") / "small"
    veneer.write_model(minigpt.MiniGPTForCausalLM(config).eval(), tokenizer, place)
    return place


@pytest.fixture(scope="module")
def poem(home, tmp_path_factory):
    """An adapter over the small trained model."""
    base = veneer.load_base(home)
    veneer.attach(base.model, veneer.LoRA(rank=4, targets="all"))
    place = tmp_path_factory.mktemp("adapters") / "poem"
    veneer.save(shake(base.model, size=0.05), place, tokenizer=base.tokenizer)
    return place


@pytest.fixture(scope="module")
def process(home, poem):
    served = start(home, "--adapter", f"poem={poem}", "--queue", "64", python=warm.executable())
    yield served
    served.process.kill()
    served.process.wait()
    served.process.stdout.close()
    served.process.stderr.close()


def test_it_answers_as_the_model_does(process, home, poem):
    base = veneer.load_base(home)
    veneer.load(base.model, poem, name="poem", tokenizer=base.tokenizer)
    sampling = veneer.Sampling(max_new_tokens=12)
    for name, which in ((home.name, None), ("poem", "poem")):
        veneer.use(base.model, which)
        expected = veneer.answer(base.model, base.tokenizer, "What is honey?", sampling=sampling)
        body = chat(name, "What is honey?", max_tokens=12, temperature=0)
        _, _, reply = call(process.url, "/v1/chat/completions", body)
        assert reply["choices"][0]["message"]["content"] == expected
    asked = {**chat("poem", "What is honey?"), "answer": " Honey is sweet."}
    _, _, reply = call(process.url, "/api/tokens", asked)
    assert "".join(token["text"] for token in reply["tokens"]) == " Honey is sweet."
    assert all(token["base"] < 0 and token["adapter"] < 0 for token in reply["tokens"])
    assert any(token["base"] != token["adapter"] for token in reply["tokens"])


def test_a_crowd_is_served_or_refused(process, home):
    port = int(process.url.rpartition(":")[2])
    names = (home.name, "poem")

    async def one(i: int) -> bytes:
        body = chat(names[i % 2], max_tokens=8, stream=i % 4 < 2)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("/v1/chat/completions", body, "connection: close"))
        got = await reader.read()
        writer.close()
        return got

    async def crowd() -> list[bytes]:
        return await asyncio.gather(*map(one, range(CROWD)))

    first = asyncio.run(crowd())  # once, for what is made on first use is no leak
    before, waits, done = process.memory(), [], Event()

    def look():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while not done.is_set():
            began = time.monotonic()
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            waits.append(time.monotonic() - began)
            time.sleep(0.01)
        connection.close()

    looking = Thread(target=look)
    looking.start()
    answers = asyncio.run(crowd())
    done.set()
    looking.join()
    print(f"health in a crowd of {CROWD}: at most {1000 * max(waits):.0f} ms")
    for answer in answers:
        head, _, rest = answer.partition(b"\r\n\r\n")
        if head.startswith(b"HTTP/1.1 200"):
            assert b"[DONE]" in rest or json.loads(rest)["choices"][0]["finish_reason"]
        else:
            assert head.startswith(b"HTTP/1.1 429")
            assert b"retry-after" in head.lower()
            assert b'"rate_limit_error"' in rest
    served = sum(answer.startswith(b"HTTP/1.1 200") for answer in answers)
    assert served >= 80  # as many as slots and queue have room for, at least
    going = ("veneer_engine_active", "veneer_engine_waiting")
    stats = eventually(process.stats, lambda stats: not any(stats[name] for name in going))
    assert process.memory() - before < 50e6
    refused = sum(answer.startswith(b"HTTP/1.1 429") for answer in (*first, *answers))
    assert stats.get('veneer_http_responses_total{status="429"}', 0) == refused
    assert stats['veneer_answers_total{reason="length"}'] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "needs an API key"),
        (["--enable-lora-loading"], "enable_lora_loading needs adapters_dir"),
        (["--enable-lora-loading", "--adapters-dir", "."], "needs a key of its own"),
        (["--adapter", "poem"], "must be NAME=DIRECTORY"),
        (["--adapter", "../x=."], "its name must be at most"),
        (["--adapter", "x=."], "holds no adapter"),
        (["--runs", "nowhere", "--port", "99999"], "port is 99999"),
        (["--api-key-file", "key"], "cannot be read"),
    ],
)
def test_what_cannot_be_served_is_an_error(arguments, says, home, capsys):
    assert run(["serve", str(home), *arguments]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert "Traceback" not in printed.err


def test_a_port_in_use_is_an_error(process, home, capsys):
    port = process.url.rpartition(":")[2]
    assert run(["serve", str(home), "--port", port]) == 2
    error = capsys.readouterr().err
    assert f"Cannot listen on 127.0.0.1:{port}: Address already in use." in error
    assert "name a free one by --port" in error


@pytest.mark.parametrize(
    ("by", "is_cold"),
    [
        *((signal.SIGTERM, False), (signal.SIGINT, False)),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),  # it imports all by itself
    ],
)
def test_a_long_stream_is_cut_properly_once_its_time_is_over(by, is_cold, home):
    python = sys.executable if is_cold else warm.executable()
    served = start(home, "--drain-seconds", "0.2", python=python)
    end_in_a_stream(served, home.name, by=by)


def test_sigterm_lets_a_stream_end_properly(process, home):
    end_in_a_stream(process, home.name)  # the last test that the process serves


def end_in_a_stream(served: Process, model: str, *, by: int = signal.SIGTERM) -> None:
    port = int(served.url.rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    # To the end of the context, which takes a while.
    body = {"model": model, "prompt": "Honey", "stream": True, "max_tokens": 250}
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body | {"n": 8}), headers)
    response = connection.getresponse()
    got = response.readline()
    served.process.send_signal(by)
    got += response.read()
    events = [line[6:] for line in got.decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    ends = [json.loads(event)["choices"][0]["finish_reason"] for event in events[:-1]]
    assert len([end for end in ends if end]) == 8
    try:
        out, errors = served.process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        served.process.send_signal(signal.SIGABRT)  # prints the stack of each thread
        out, errors = served.process.communicate()
    assert served.process.returncode == 0, errors
    assert "Ended." in out
    assert "Traceback" not in errors
