"""The true worker: what it trains is what `tune` trains, to the bit, whatever kills its server."""

import errno
import json
import math
import os
import signal
from pathlib import Path

import pytest

from support.jobs import ROWS, client_of, lines, serving, until, until_step, upload
from support.recipes import small_run
from veneer.cli.app import run as veneer_cli
from veneer.errors import ConfigError, DataError, StorageError, TrainingError
from veneer.files import read_tensors, storage_error, write_json
from veneer.run_directory import RunDirectory, checkpoint_steps
from veneer.serve.jobs.log import End, read_on
from veneer.serve.jobs.messages import event_of
from veneer.serve.jobs.settings import TrainingBase, settings_of
from veneer.serve.jobs.values import JobEvent, WorkerFiles
from veneer.serve.jobs.watching import STOP_SECONDS
from veneer.serve.jobs.worker import Asked, Together, Work, fault_of, work
from veneer.training.events import Evaluated


def weights(run: Path):
    tensors = read_tensors(run / "lora_adapter" / "lora_weights.pt")
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def tuned_again(run: Path, place: Path):
    """Return what the command line trains by the recipe that a job has left."""
    command = ["tune", "--config", run / "recipe.yaml", "--out", place, "--quiet"]
    settings = RunDirectory(run).read_recipe()
    assert veneer_cli([str(x) for x in [*command, settings["model"], settings["data"]]]) == 0
    return weights(place)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("small"))


ASKED = {"n_epochs": 2, "learning_rate_multiplier": 0.5, "batch_size": 6}


def asked(
    small, run, *, start_from=None, hyperparameters=ASKED, rank=2, grader=None, valid=None, **own
):
    base, data = small
    own = {"max_length": 64} | own | ({"rank": rank} if rank else {})
    files = WorkerFiles(run)
    files.directory.mkdir(parents=True)
    settings = settings_of(
        TrainingBase(str(base), "float32"),
        data=data,
        valid=valid,
        out=run,
        start_from=start_from,
        seed=3,
        hyperparameters=hyperparameters,
        own=own,
        grader=grader,
    )
    write_json(files.settings, settings)
    return files.log


class AfterSteps(Asked):
    """Asks to stop after so many looks."""

    def __init__(self, looks: int) -> None:
        super().__init__(None)
        self.looks = looks

    def __call__(self) -> bool:
        self.looks -= 1
        return self.looks <= 0


def test_a_job_stops_goes_on_and_is_the_run_of_its_recipe(small, tmp_path):
    run = tmp_path / "run"
    log = asked(small, run)
    work(run, 1, AfterSteps(3))
    before, at = read_on(log, 0)
    assert before[-1].content == End("stopped")
    assert max(checkpoint_steps(run / "checkpoints")) == 3
    work(run, 2, Asked(None))
    again, at = read_on(log, at)
    assert again[-1].content == End("succeeded")
    texts = [line.content.message for line in again[:-1]]
    assert "Training goes on after step 3 of 10." in texts
    (merged,) = [x.content.data for x in again[:-1] if "certificate" in (x.content.data or {})]
    assert merged["certificate"]["effect"] > 0
    settings = RunDirectory(run).read_recipe()
    assert settings["tokens_per_step"] == 71  # of 6 rows, of 284 / 24 tokens in the mean
    assert settings["lr"] == 0.0025  # half of the usual one
    assert weights(run) == tuned_again(run, tmp_path / "again")
    work(run, 3, Asked(None))  # its end was not heard
    assert read_on(log, at)[0][0].content == End("succeeded")


def join(first: Path, attempt: int, *others: Path):
    lines = [f"{other}\t{attempt}\n" for other in others]
    WorkerFiles(first).joined(attempt).write_text("".join(lines))


def end_of(log: Path) -> End:
    """Return the end of the last attempt; everything else is read once."""
    return read_on(log, 0)[0][-1].content


def test_jobs_train_together_and_go_on_together(small, tmp_path):
    first, second, bad = (tmp_path / name for name in ("first", "second", "bad"))
    logs = [
        asked(small, first, steps=6, hyperparameters={}),
        asked(small, second, rank=3, steps=4, hyperparameters={}),
        asked(small, bad, max_length=2, long_rows="error", hyperparameters={}),
    ]
    join(first, 1, second, bad)
    work(first, 1, AfterSteps(8))
    assert [end_of(log).how for log in logs] == ["stopped", "stopped", "apart"]
    events = [line.content for log in logs for line in read_on(log, 0)[0]]
    assert not [x for x in events if isinstance(x, JobEvent) and str(tmp_path) in x.message]
    steps = [max(checkpoint_steps(run / "checkpoints")) for run in (first, second)]
    assert 0 < steps[0] < 6
    assert 0 < steps[1] < 4
    assert read_on(logs[1], 0)[0][0].content.message.startswith("It joins a process")
    join(first, 2, second)
    WorkerFiles(second).stop(1).touch()  # of an attempt that is over
    WorkerFiles(first).remove_earlier(2)
    left = [path.name for path in WorkerFiles(first).directory.glob("joined-*")]
    assert left == ["joined-2"]
    work(first, 2, Asked(None))
    for run, log, count in ((first, logs[0], 6), (second, logs[1], 4)):
        assert end_of(log) == End("succeeded")
        assert [line["step"] for line in RunDirectory(run).read_metrics()] == [*range(1, count + 1)]
        assert weights(run)
        assert RunDirectory(run).merged().is_dir()
    # One that is to stop does, and the other ends.
    third = tmp_path / "third"
    log = asked(small, third, steps=2, hyperparameters={})
    fourth = tmp_path / "fourth"
    left = asked(small, fourth, steps=1, hyperparameters={})
    WorkerFiles(fourth).stop(1).touch()
    # It comes again, in the same process.
    lines = "".join(f"{fourth}\t{attempt}\n" for attempt in (1, 2))
    WorkerFiles(third).joined(1).write_text(lines)
    work(third, 1, Asked(None))
    assert end_of(log) == End("succeeded")
    ends = [x for x in read_on(left, 0)[0] if isinstance(x.content, End)]
    assert [(x.attempt, x.content.how) for x in ends] == [(1, "stopped"), (2, "succeeded")]


def test_each_kind_of_error_has_its_code():
    errors = {
        "invalid_training_file": DataError(""),
        "invalid_settings": ConfigError(""),
        "disk_failed": StorageError(""),
        "training_failed": TrainingError(""),
        "server_error": ValueError(),
    }
    assert [fault_of(error).code for error in errors.values()] == [*errors]


def test_an_error_of_the_disk_shows_the_client_no_path(small, tmp_path, capsys):
    log = asked(small, tmp_path / "run")
    Work(tmp_path / "run", 1, Asked(None)).fail(storage_error(OSError(errno.ENOSPC, ""), tmp_path))
    fault = end_of(log).fault
    assert (fault.code, str(tmp_path) in fault.message) == ("disk_failed", False)
    assert "The job can be resumed" in fault.message
    assert f"{tmp_path} cannot be written: the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_of_all_ends_a_job_alone_and_parts_several(small, tmp_path, capsys, count):
    runs = [tmp_path / str(number) for number in range(count)]
    logs = [asked(small, run) for run in runs]
    first, *others = (Work(run, 1, Asked(None)) for run in runs)
    together = Together(first)
    together.jobs |= {job.run.name: job for job in others}
    together.fail_all(RuntimeError("out of memory"))
    ends = [end_of(log) for log in logs]
    assert [end.how for end in ends] == (["failed"] if count == 1 else ["apart", "apart"])
    assert "out of memory" in capsys.readouterr().err
    assert not any("out of memory" in (end.fault.message if end.fault else "") for end in ends)


def test_preferences_are_learnt(small, tmp_path):
    base, _ = small
    data, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "x"} for row in ROWS
    ]
    data.write_bytes(lines(pairs))
    own = {"objective": "dpo", "steps": 2, "rank": 2}
    log = asked((base, data), run, hyperparameters={"learning_rate_multiplier": 2.0}, **own)
    work(run, 1, Asked(None))
    assert end_of(log) == End("succeeded")
    settings = RunDirectory(run).read_recipe()
    assert (settings["objective"], settings["lr"]) == ("dpo", 0.001)  # a tenth of that for answers
    assert "Read 24 rows" in read_on(log, 0)[0][0].content.message


PROMPTS = [
    {"messages": [{"role": "user", "content": f"Say {letter}"}], "letter": letter}
    for letter in "abc"
]
GRADER = {
    "type": "string_check",
    "name": "has it",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.letter }}",
    "operation": "like",
}


@pytest.fixture(scope="module")
def prompts(small, tmp_path_factory):
    """A base, and prompts as OpenAI has them."""
    data = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    data.write_bytes(lines(PROMPTS))
    return small[0], data


def on_samples(prompts, run, field, **own):
    grader = GRADER | {"reference": f"{{{{ item.{field} }}}}"}
    own |= {"objective": "grpo", "steps": 3, "max_new_tokens": 5, "kl_weight": 0.1}
    chosen = {"batch_size": 2, "compute_multiplier": 0.5, "learning_rate_multiplier": 2.0}
    chosen |= {"eval_interval": 1, "eval_samples": 2}
    return asked(prompts, run, hyperparameters=chosen, grader=grader, valid=prompts[1], **own)


def test_samples_are_learnt_from_and_gone_on_with(prompts, tmp_path):
    run = tmp_path / "run"
    log = on_samples(prompts, run, "letter")
    work(run, 1, AfterSteps(2))
    assert end_of(log) == End("stopped")
    work(run, 2, Asked(None))
    assert end_of(log) == End("succeeded")
    settings, samples = RunDirectory(run).read_recipe(), RunDirectory(run).samples.read_text()
    assert (settings["group_size"], settings["prompts_per_step"]) == (4, 2)
    assert settings["lr"] == 0.001  # twice a tenth of that for answers
    events = [x.content for x in read_on(log, 0)[0] if isinstance(x.content, JobEvent)]
    steps = [x for x in events if "train_loss" in (x.data or {})]
    assert [x.data["step"] for x in steps] == [1, 2, 3]
    assert {"reward", "reward/has it", "kl", "entropy"} <= steps[0].data.keys()
    assert ", mean reward=" in steps[0].message
    evaluations = [x.data for x in events if "valid_reward" in (x.data or {})]
    assert [data["step"] for data in evaluations] == [0, 1, 2, 3]
    assert all(data["valid_reward"] == data["valid_reward/has it"] for data in evaluations)
    before = weights(run)
    assert before == tuned_again(run, tmp_path / "again")  # and never stopped
    assert RunDirectory(tmp_path / "again").samples.read_text() == samples


def test_an_evaluation_in_which_no_answer_has_a_reward_is_an_event_that_clients_can_read():
    event = event_of(Evaluated(2, math.nan, None, False, {"reward_faults": 3.0}), 4)
    assert json.loads(json.dumps(event.data, allow_nan=False)) == {"step": 2, "total_steps": 4}


def test_prompts_without_what_a_grader_reads_are_named(prompts, tmp_path):
    log = on_samples(prompts, tmp_path / "run", "leter")
    work(tmp_path / "run", 1, Asked(None))
    fault = end_of(log).fault
    assert fault.code == "invalid_training_file"
    assert "3 of 3 prompts cannot be used" in fault.message
    assert "prompts.jsonl:2: the row has no item.leter, which has it reads" in fault.message


@pytest.mark.parametrize("hyperparameters", [ASKED, {}])  # without any it may share passes
def test_faults_of_rows_are_named_without_our_paths(small, tmp_path, hyperparameters):
    run = tmp_path / "run"
    log = asked(small, run, long_rows="error", max_length=2, hyperparameters=hyperparameters)
    work(run, 1, Asked(None))
    end = read_on(log, 0)[0][-1].content
    assert (end.how, end.fault.code) == ("failed", "invalid_training_file")
    assert "rows.jsonl:1" in end.fault.message
    assert run.name not in end.fault.message
    assert str(small[1].parent) not in end.fault.message


@pytest.mark.slow
def test_a_job_starts_from_an_adapter(small, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    asked(small, first, steps=2, hyperparameters={})
    work(first, 1, Asked(None))
    log = asked(
        small, second, steps=1, start_from=first / "lora_adapter", rank=None, hyperparameters={}
    )
    work(second, 1, Asked(None))
    assert read_on(log, 0)[0][-1].content == End("succeeded")
    assert RunDirectory(second).read_recipe()["rank"] == 2


@pytest.fixture
def started():
    """Starts servers, which end with the test."""
    processes = []

    def start(base, runs):
        server = serving(base, runs)
        processes.append(server.process)
        return server.process, client_of(server)

    yield start
    for process in processes:
        process.kill()
        process.wait()


OF_ANSWERS = {
    "extra_body": {"steps": 120, "save_every": 10, "rank": 2, "tokens_per_step": 100},
}
FEW = {"group_size": 2, "max_new_tokens": 3}
OF_SAMPLES = {
    "extra_body": {"steps": 30, "save_every": 2, "rank": 2, "lr": 1e-4, **FEW},
    "method": {"type": "reinforcement", "reinforcement": {"grader": GRADER}},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("worker_too", "rows", "asks"),
    [(False, ROWS, OF_ANSWERS), (True, ROWS, OF_ANSWERS), (True, PROMPTS, OF_SAMPLES)],
    ids=["server", "both", "both of samples"],
)
def test_a_killed_server_goes_on_with_its_job(small, started, tmp_path, worker_too, rows, asks):
    """Shown to the bit beside `tune`, with the worker left to itself, and killed too."""
    runs = tmp_path / "runs"
    runs.mkdir()
    server, client = started(small[0], runs)
    file = upload(client, rows)
    assert client.files.content(file.id).read() == lines(rows)
    job = client.fine_tuning.jobs.create(model=small[0].name, training_file=file.id, **asks)
    steps, save_every = asks["extra_body"]["steps"], asks["extra_body"]["save_every"]
    until_step(client, job.id, 2 * save_every)
    below = Path(f"/proc/{server.pid}/task")
    children = [int(x) for task in below.iterdir() for x in (task / "children").read_text().split()]
    server.kill()
    if worker_too:
        for child in children:
            os.kill(child, signal.SIGKILL)
    server.wait()
    run = next(runs.glob("ft-*"))
    server, client = started(small[0], runs)
    done = until(client, job.id, "succeeded", "failed")
    assert done.status == "succeeded", done
    events = [x.message for x in client.fine_tuning.jobs.list_events(job.id, limit=500)]
    assert any(text.startswith("Training goes on after step") for text in events)
    answer = client.chat.completions.create(
        model=done.fine_tuned_model, messages=[{"role": "user", "content": "a"}], max_tokens=3
    )
    assert answer.usage.completion_tokens >= 1
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
    assert checkpoint.step_number == steps
    server.terminate()
    assert server.wait(STOP_SECONDS + 60) == 0
    assert json.loads((run / "progress.json").read_text())["ended"] in ("finished", "diverged")
    assert weights(run) == tuned_again(run, tmp_path / "again")
