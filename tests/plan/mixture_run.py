"""Train a mixture of experts for a few steps, and print what memory that took.

python mixture_run.py DIRECTORY BITS: 16, 4 for NF4 in memory, or 0 for a directory that
`veneer quantize` wrote, which stays mapped.
"""

import json
import sys
from typing import Any

from measured_run import LENGTH, measured_run

from veneer.data.packing import pack

ROWS, STEPS = 4, 4


def step(model: Any, forward: Any, optimizer: Any, examples: Any) -> None:
    optimizer.begin()
    (forward(model, pack(examples, range(ROWS))) / (ROWS * LENGTH)).backward()
    optimizer.step(lr=1e-3, clip=1.0)


def main(home: str, bits: int) -> None:
    run = measured_run(home, step, rows=ROWS, steps=STEPS, mapped=bits > 0, bits=bits or None)
    print(json.dumps(run))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
