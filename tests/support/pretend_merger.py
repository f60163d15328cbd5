"""A process that merges nothing and says what the true one does, without torch.

    python tests/support/pretend_merger.py DIRECTORY SERVER

It waits while there is a file `wait` beside the directory, and dies where there is one `die`.
"""

import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from veneer.files import read_json, write_json
from veneer.serve.jobs.merges import STATE, Merge

CERTIFICATE = {
    "dtype": "bfloat16",
    "tokens": 300,
    "lost": 0.6,
    "effect": 2.0,
    "divergence": 0.01,
    "worst": {"path": "model.layers.0.mlp.up_proj", "lost": 0.7},
    "problems": [],
}


def main(directory: str, server: str) -> None:
    place = Path(directory)
    merge = Merge(**read_json(place / STATE))
    write_json(place / STATE, asdict(replace(merge, doing="merging")))
    while (place.parent / "wait").exists():
        time.sleep(0.01)
    if (place.parent / "die").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    Path(merge.model).mkdir()
    (Path(merge.model) / "config.json").write_text("{}")
    done = replace(merge, state="done", doing="", certificate=CERTIFICATE, bytes=2)
    write_json(place / STATE, asdict(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
