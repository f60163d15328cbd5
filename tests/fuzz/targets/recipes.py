"""Recipes of --config and lists of jobs of --jobs: YAML that becomes flags of `veneer tune`."""

from pathlib import Path

from cyclopts import CycloptsError

from veneer.cli.app import app

MODULES = ("veneer.cli.recipes", "veneer.cli.jobs_file", "veneer.cli.file_settings")
RECIPE = b"""\
model: llama
data: [rows.jsonl:0.5, more.jsonl:0.5]
rank: 8
targets: [q_proj, "re:.*v_proj"]
rank-pattern: {".*0.q_proj": 4}
dora: true
lr: 1e-4
method: qlora
"""
JOBS = b"""\
jobs:
  - name: small
    data: rows.jsonl
    rank: 4
  - name: 007
    <<: {rank: 8}
    data: &x rows.jsonl
    from: *x
"""


def seeds() -> list[bytes]:
    return [RECIPE, JOBS, b"rank: [1, 2]\nsteps: 2024-01-01\nseed: !!int 0x10\n"]


def read(data: bytes, place: Path) -> None:
    file = place / "settings.yaml"
    file.write_bytes(data)
    flag = "--jobs" if b"jobs" in data else "--config"
    try:
        app.parse_args(
            ["tune", "llama", "rows.jsonl", flag, str(file)],
            exit_on_error=False,
            print_error=False,
        )
    except CycloptsError as error:  # which `veneer` shows in one line
        str(error)
