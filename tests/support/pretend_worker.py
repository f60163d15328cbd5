"""A worker that trains nothing and writes a log as the true one does, without torch.

    python tests/support/pretend_worker.py RUN ATTEMPT SERVER

It makes the steps that the job's settings ask for; after the one in the file `wait`, it waits until
that file is gone. The adapter that it leaves is a copy of the directory `result`. It fails where
they ask for a rank of 13, and dies at once at 14.
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


def main(run: str, attempt: str, server: str) -> None:
    files, directory = WorkerFiles(Path(run)), RunDirectory(Path(run))
    log = WorkerLog(files.log, int(attempt))
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    settings = json.loads(files.settings.read_text())
    rank = settings["lora"].get("rank")
    if rank == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 13:
        text = f"1 of 2 rows cannot be used:\n  {settings['data']}:2: not so"
        text = text.replace(f"{Path(settings['data']).parent}/", "")
        log.end("failed", Fault("invalid_training_file", text, "training_file"))
        return
    steps = settings["training"].get("steps", 3)
    done = max((line["step"] for line in directory.read_metrics()), default=0)
    log.add(JobEvent("Training starts.", data={"total_steps": steps}))
    wait = Path(run).parent / "wait"
    for step in range(done + 1, steps + 1):
        data = {"step": step, "total_steps": steps, "train_loss": 1 / step, "tokens": 10}
        line = {"step": step, "loss": 1 / step, "tokens": 10, "seconds": 0.1}
        directory.append_metrics(line)
        (directory.checkpoints / f"step-{step:06d}").mkdir(parents=True)
        log.add(JobEvent(f"Step {step}/{steps}: training loss={1 / step:.4f}", data=data))
        log.add(JobEvent(f"Checkpoint created at step {step}.", data={"checkpoint": step}))
        while wait.exists() and step >= int(wait.read_text() or 0) and not stopped:
            time.sleep(0.01)
        if stopped:
            log.add(JobEvent(f"Stopped after step {step}.", data={"stopped": step}))
            log.end("stopped")
            return
    result = Path(run).parent / "result"
    if result.exists():
        shutil.copytree(result, directory.adapter())
    else:
        directory.adapter().mkdir()
    log.end("succeeded")


if __name__ == "__main__":
    main(*sys.argv[1:])
