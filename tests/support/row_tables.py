"""Rows loaded both ways: as a list in memory, and as a table on the disk."""

from __future__ import annotations

from veneer.data import load
from veneer.data.load import RowFiles


def here(task, waiting):
    for block in waiting:
        yield block.number, len(block.lines or ()), task.do(block)


def result_of(work):
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


def both_ways(data, tokenizer, monkeypatch, *, limit=None, **settings):
    """Return what is loaded as a list, and as a table."""
    with monkeypatch.context() as small:
        small.setattr(load, "SMALL", 2**30)
        listed = result_of(RowFiles(data, limit=limit).load(tokenizer, **settings))
    assert isinstance(listed.examples, list)
    return listed, result_of(RowFiles(data, limit=limit).load(tokenizer, **settings))
