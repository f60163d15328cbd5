"""What a job has trained as one file to take away, in the format that a person asks for."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Literal

from veneer.errors import RequestError
from veneer.formats.convert import convert
from veneer.models.load import load_skeleton
from veneer.run_directory import RunDirectory
from veneer.serve.jobs.service import Jobs

Format = Literal["native", "peft", "gguf", "mlx"]


def zipped(jobs: Jobs, id: str, format: Format) -> Path:
    """Return a zip file with the adapter of a job, which the caller removes.

    Raises Missing, RequestError for a job without a result, and AdapterError for an adapter that
    has no place in the format.
    """
    job = jobs.job(id)
    source = RunDirectory(jobs.places.run(job)).adapter()
    if job.status != "succeeded" or not source.is_dir():
        raise RequestError(f"{job.id} has no result: it is {job.status}.", param="job_id")
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / (f"{job.name}.gguf" if format == "gguf" else job.name)
        if format == "native":
            shutil.copytree(source, out)
        else:
            base = load_skeleton(jobs.base.name)
            convert(source, out, to=format, base=base, base_name=jobs.base.name)
        return _zip_of(out)


def zipped_model(jobs: Jobs, name: str) -> Path:
    """Return a zip file with the model that an adapter was merged into, which the caller removes.

    Raises RequestError where there is none.
    """
    merge = jobs.merged(name)
    if merge is None or merge.state != "done":
        raise RequestError(f"{name[:80]} has no merged model.", param="model")
    return _zip_of(Path(merge.model))


def _zip_of(source: Path) -> Path:
    """Return a zip file of a file or directory, with its name in it."""
    files = [file for file in [source, *source.rglob("*")] if file.is_file()]
    with tempfile.NamedTemporaryFile(suffix=".zip", delete=False) as target:
        path = Path(target.name)
        try:
            # The weights are what is large, and compression finds nothing in them.
            with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
                for file in sorted(files):
                    archive.write(file, file.relative_to(source.parent))
        except BaseException:  # the disk may be full
            path.unlink()
            raise
    return path
