"""A worker that trains nothing and writes a log as the true one does, without torch.

    python tests/support/pretend_worker.py RUN ATTEMPT SERVER

It makes the steps that a job's settings ask for, in turns with those of jobs that join it; after
the one in the file `wait`, it waits until that file is gone. The adapter that it leaves is a copy
of the directory `result`. A job fails where its settings ask for a rank of 13, and lets the process
die at 14; one with 12 trains beside no other.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from veneer.run_directory import RunDirectory
from veneer.serve.jobs.log import WorkerLog
from veneer.serve.jobs.values import Fault, JobEvent, WorkerFiles


class Pretended:
    """One job, of `steps` steps, of which `done` were made before."""

    def __init__(self, run, attempt, *, joins):
        self.run, self.attempt, self.ended = Path(run), int(attempt), False
        self.files, self.directory = WorkerFiles(self.run), RunDirectory(self.run)
        self.log = WorkerLog(self.files.log, self.attempt)
        settings = json.loads(self.files.settings.read_text())
        rank = settings["lora"].get("rank")
        if rank == 14:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 13:
            text = f"1 of 2 rows cannot be used:\n  {settings['data']}:2: not so"
            text = text.replace(f"{Path(settings['data']).parent}/", "")
            self.end("failed", Fault("invalid_training_file", text, "training_file"))
        elif rank == 12 and joins:
            self.end("apart")
        else:
            self.steps = settings["training"].get("steps", 3)
            lines = self.directory.read_metrics()
            self.done = self.step = max((line["step"] for line in lines), default=0)
            self.log.add(JobEvent("Training starts.", data={"total_steps": self.steps}))

    def end(self, how, fault=None):
        self.ended = True
        self.log.end(how, fault)

    def go_on(self, *, stops):
        """Make a step, or see that there is none to make."""
        wait, has_begun = self.run.parent / "wait", self.step > self.done
        if has_begun and (stops or self.files.stop(self.attempt).exists()):
            self.log.add(JobEvent(f"Stopped after step {self.step}.", data={"stopped": self.step}))
            self.end("stopped")
        elif has_begun and wait.exists() and self.step >= int(wait.read_text() or 0):
            pass
        elif self.step == self.steps:
            self.finish()
        else:
            self.step += 1
            self.learn(self.step)

    def learn(self, step):
        loss, steps = 1 / step, self.steps
        data = {"step": step, "total_steps": steps, "train_loss": loss, "tokens": 10}
        line = {"step": step, "loss": loss, "tokens": 10, "seconds": 0.1}
        self.directory.append_metrics(line)
        (self.directory.checkpoints / f"step-{step:06d}").mkdir(parents=True)
        self.log.add(JobEvent(f"Step {step}/{steps}: training loss={loss:.4f}", data=data))
        self.log.add(JobEvent(f"Checkpoint created at step {step}.", data={"checkpoint": step}))

    def finish(self):
        result = self.run.parent / "result"
        if result.exists():
            shutil.copytree(result, self.directory.adapter())
        else:
            self.directory.adapter().mkdir()
        self.end("succeeded")


def main(run: str, attempt: str, server: str) -> None:
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    joined, read = WorkerFiles(Path(run)).joined(int(attempt)), 0
    jobs = [Pretended(run, attempt, joins=False)]
    while not all(job.ended for job in jobs):
        lines = joined.read_text().splitlines() if joined.exists() else []
        jobs += [Pretended(*line.split("\t"), joins=True) for line in lines[read:]]
        read = len(lines)
        for job in jobs:
            if not job.ended:
                job.go_on(stops=bool(stopped))
        time.sleep(0.01 * (run_waits(Path(run))))


def run_waits(run: Path) -> bool:
    return (run.parent / "wait").exists()


if __name__ == "__main__":
    main(*sys.argv[1:])
