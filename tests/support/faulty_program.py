"""`veneer`, with files of no content as pictures, few rows to pretrain on, and a merge that is
compared by few: these take longer than all else in such runs.

python -m support.faulty_program ARGUMENTS

The environment's FAULTY_BUG puts one of BUGS into it, for the harness to find.
"""

import os
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import veneer.cli.tune
from veneer import errors, files
from veneer.adapter import certify
from veneer.cli import app, main
from veneer.formats import convert
from veneer.training import pretrain

veneer.cli.tune.draw_losses = lambda lines, path: path.touch()
pretrain.DOCUMENTS = 200
probe_rows = certify.probe_rows
certify.probe_rows = lambda *arguments, **options: probe_rows(*arguments, **options)[:2]


@contextmanager
def passes_on(path):
    yield


def removes_first(temporary, path):
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


BUGS = {
    "says nothing": [(errors.StorageError, "exit_code", 0)],
    "explains nothing": [
        (files, "disk_errors", passes_on),
        (app, "storage_error", lambda error: None),
    ],
    "removes first": [(files, "_take_place", removes_first)],
    "cleans nothing": [(files, "shutil", SimpleNamespace(rmtree=lambda *_, **__: None))],
    "clears nothing": [
        (files, "remove_leftovers", lambda *_: None),
        (convert, "remove_leftovers", lambda *_: None),
    ],
}
for place, name, value in BUGS.get(os.environ.get("FAULTY_BUG", ""), ()):
    setattr(place, name, value)

if __name__ == "__main__":
    main()
