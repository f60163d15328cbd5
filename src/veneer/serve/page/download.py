"""What a job has trained as one file to take away, in the format that a person asks for."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from veneer.errors import RequestError
from veneer.formats.convert import convert
from veneer.models.load import load_skeleton
from veneer.run_directory import RunDirectory
from veneer.serve.jobs.service import Jobs

Format = Literal["native", "peft", "gguf", "mlx"]
PIECE = 2**20  # bytes of a file that are read at once


def zipped(jobs: Jobs, id: str, format: Format) -> Iterator[bytes]:
    """Return the pieces of a zip file with the adapter of a job.

    Raises, before the first piece, Missing, RequestError for a job without a result, and
    AdapterError for an adapter that has no place in the format.
    """
    job = jobs.job(id)
    source = RunDirectory(jobs.places.run(job)).adapter()
    if job.status != "succeeded" or not source.is_dir():
        raise RequestError(f"{job.id} has no result: it is {job.status}.", param="job_id")
    if format == "native":
        return zip_of(source, job.name)
    place = tempfile.TemporaryDirectory()
    out = Path(place.name) / (f"{job.name}.gguf" if format == "gguf" else job.name)
    try:
        convert(
            source, out, to=format, base=load_skeleton(jobs.base.name), base_name=jobs.base.name
        )
    except BaseException:
        place.cleanup()
        raise

    def pieces() -> Iterator[bytes]:
        with place:
            yield from zip_of(out, out.name)

    return pieces()


def zipped_model(jobs: Jobs, name: str) -> Iterator[bytes]:
    """Return the pieces of a zip file with the model that an adapter was merged into.

    Raises RequestError, before the first piece, where there is none.
    """
    merge = jobs.merged(name)
    if merge is None or merge.state != "done":
        raise RequestError(f"{name[:80]} has no merged model.", param="model")
    model = Path(merge.model)
    return zip_of(model, model.name)


def zip_of(source: Path, name: str) -> Iterator[bytes]:
    """Yield a zip file of a file or directory, which has that name in it, as it is read: nothing of
    it is kept, in memory or on the disk."""
    files = [file for file in [source, *source.rglob("*")] if file.is_file()]
    sink = _Sink()
    # The weights are what is large, and compression finds nothing in them.
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(files):
            inside = Path(name) / file.relative_to(source)
            entry = zipfile.ZipInfo.from_file(file, inside, strict_timestamps=False)
            with file.open("rb") as data, archive.open(entry, "w") as target:
                while piece := data.read(PIECE):
                    target.write(piece)
                    yield sink.taken()
    yield sink.taken()


class _Sink:
    """What an archive is written to: it keeps the bytes until they are taken, and has no place to
    go back to, so that sizes and sums follow behind each file."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Do nothing: the bytes are here."""

    def close(self) -> None:
        """Do nothing: what was written can still be taken."""

    def taken(self) -> bytes:
        """Return what was written since the last call."""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)
