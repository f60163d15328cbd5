"""What jobs have trained, under its name among the adapters that are served."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from veneer.errors import AdapterError
from veneer.run_directory import RunDirectory, checkpoint_steps
from veneer.serve.engine.served import Served
from veneer.serve.jobs.values import Job, Places

log = logging.getLogger("veneer.serve")


class Publisher:
    """Adds results and checkpoints of jobs to what is served, and removes what is gone.

    A checkpoint is served too, so that what a run learns can be asked while it goes on.
    """

    def __init__(self, served: Served, places: Places) -> None:
        self.served, self.places = served, places

    def publish(self, job: Job, *, result: bool, load: bool = True) -> str:
        """Let a job's checkpoints be served, and its result where there is one. Return why that
        cannot be, or nothing. load: look now whether the engine takes it."""
        library = self.served.library
        checkpoints = self.checkpoints(job)
        for name in [entry.name for entry in library.entries()]:
            if name.startswith(f"{job.name}.step-") and name not in checkpoints:
                with suppress(AdapterError):  # it was unloaded meanwhile
                    library.remove(name)
        for name, place in checkpoints.items():
            if library.find(name) is None:
                with suppress(AdapterError):  # the run has just removed it
                    library.add(name, place)
        if not result:
            return ""
        try:
            library.add(job.name, RunDirectory(self.places.run(job)).adapter())
            if load:
                self.served.engine.load(job.name)
        except AdapterError as error:
            entry = library.find(job.name)
            if entry is not None:
                library.refuse(entry, str(error))
            return str(error)
        except Exception as error:  # for want of memory, perhaps: that of one job harms no other
            log.exception("The result of %s could not be loaded.", job.id)
            return f"loading it ended in {type(error).__name__}: {error}; a request tries again"
        return ""

    def checkpoints(self, job: Job) -> dict[str, Path]:
        """Return the checkpoints of a job that are on the disk, by the names of their models."""
        steps = checkpoint_steps(RunDirectory(self.places.run(job)).checkpoints)
        return {f"{job.name}.{place.name}": place for _, place in sorted(steps.items())}
