"""A base's chat template comes from anyone: it can neither hang a process nor fill its memory."""

import os
import signal
import threading

import pytest
from chat_templates import CHATML

from support.random_adapters import tokenizer
from veneer.data import template_limits
from veneer.data.chat import Chat
from veneer.data.rows import Message
from veneer.errors import DataError

MESSAGES = [Message("user", "a"), Message("assistant", "b")]
LONG = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
GROWS = (
    "{% set ns = namespace(x='aaaaaaaa') %}"
    "{% for i in range(99999) %}{% set ns.x = ns.x + ns.x[:1000000] %}{% endfor %}"
)


def chat(template: str) -> Chat:
    named = tokenizer()
    named.chat_template = template
    return Chat(named)


@pytest.fixture
def watched(monkeypatch):
    """Limits that are reached soon, looked at often."""
    monkeypatch.setattr(template_limits, "SECONDS", 0.2)
    monkeypatch.setattr(template_limits, "BYTES", 2**25)
    monkeypatch.setattr(template_limits, "INTERVAL", 0.01)
    monkeypatch.setattr(template_limits, "_watcher", None)  # one that has these


@pytest.mark.parametrize("template", [LONG, GROWS])
def test_a_template_that_does_not_end_is_ended(template, watched):
    for _ in range(2):  # and nothing of the first is left
        with pytest.raises(DataError, match="does not end"):
            chat(template).render(MESSAGES)
    assert template_limits._now == {}
    assert chat(CHATML).render(MESSAGES)


def test_each_thread_is_ended_for_itself(watched):
    ends = []

    def render(template):
        try:
            ends.append(chat(template).render(MESSAGES)[:12])
        except DataError as error:
            ends.append(str(error)[:11])

    threads = [threading.Thread(target=render, args=(t,)) for t in (LONG, CHATML, LONG)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["<|im_start|>", "the model's", "the model's"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_a_fork_has_a_watcher_of_its_own(watched):
    assert chat(CHATML).render(MESSAGES)
    with template_limits._lock:  # as another thread of the forked process may hold it
        template_limits._now[1] = None
        child = os.fork()
        if child == 0:
            signal.alarm(300)  # rather than to wait for that lock for ever
            code = 1
            try:
                chat(LONG).render(MESSAGES)
            except DataError:
                code = 7
            finally:
                os._exit(code)
        del template_limits._now[1]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ 9 ** 9 ** 9 }}", "a power in line 1"),
        ("a\n{{ 'a' * 10000000000 }}", "the number 10000000000 in line 2"),
        ("{{ 'a' * 0xffffffffff }}", "the number 0xffffffffff in line 1"),
        (f"{{{{ {'9' * 5000} }}}}", "the number 99999999999999999999 in line 1"),
        ("{{ 'a' * (1e10 | int) }}", "the number 1e10 in line 1"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", ""),
        ("{{ range(999999) }}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ raise_exception('no') }}", "refuses the messages: no"),
        ("{% for", "refuses the messages"),
    ],
)
def test_a_template_that_cannot_be_is_refused(template, what):
    with pytest.raises(DataError, match="chat template") as raised:
        chat(template).render(MESSAGES)
    assert what in str(raised.value)


def test_numbers_of_ordinary_templates_are_taken():
    assert chat("{{ 100_000 * 2 }}").render(MESSAGES) == "200000"
