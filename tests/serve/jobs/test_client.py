"""OpenAI's own client, as it is, against the routes for files and jobs."""

from dataclasses import fields

import openai
import pytest

from support.jobs import ROWS, client_of, training, until, until_step, upload
from support.server import AS_ADMIN, call, chat
from support.waiting import eventually
from veneer.objectives.policy_config import OnPolicy
from veneer.serve.jobs import uploads
from veneer.serve.jobs.settings import MOST_OF_SAMPLES

GRADER = {
    "type": "string_check",
    "name": "right",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "operation": "ilike",
}


def reinforced(grader=GRADER, **hyperparameters):
    own = {"grader": grader} | ({"hyperparameters": hyperparameters} if hyperparameters else {})
    return {"type": "reinforcement", "reinforcement": own}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with training(tmp_path_factory.mktemp("trained") / "runs") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


@pytest.fixture(scope="module")
def file(client):
    return upload(client)


@pytest.fixture
def wait(server):
    """A file that keeps workers at the step that it names."""
    path = server.jobs.places.root / "wait"
    path.write_text("2")
    yield path
    path.unlink(missing_ok=True)


def test_a_file_comes_is_listed_read_and_goes(client):
    sent = upload(client, name="../my rows.jsonl")
    assert (sent.object, sent.purpose, sent.status) == ("file", "fine-tune", "processed")
    assert sent.rows == len(ROWS)
    assert sent.bytes == len(client.files.content(sent.id).read())
    assert client.files.retrieve(sent.id) == sent
    other = upload(client, ROWS[:1])
    assert [file.id for file in client.files.list(limit=1)][:2] == [other.id, sent.id]
    assert [file.id for file in client.files.list(order="asc", purpose="batch")] == []
    assert client.files.delete(sent.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(sent.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(sent.id)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        (
            "rows.jsonl",
            b'{"prompt": "a", "completon": "b"}\n',
            ("rows.jsonl:1: ", "did you mean 'completion'"),
        ),
        (
            "rows.jsonl",
            b'{"text": "a"}\n{"txt": "b"}\n{"text"',
            ("rows.jsonl:2: ", "rows.jsonl:3: "),
        ),
        ("rows.jsonl", b"\n", ("rows.jsonl holds no rows",)),
        ("rows.csv", b"a,b\n1,2\n", ("rows.csv:2: ",)),
        ("rows.jsonl.gz", b"\x1f\x8b", ("of a kind that is not trained on",)),
        ("rows.exe", b"{}", ("of a kind that is not trained on",)),
    ],
)
def test_faults_of_a_file_are_named_by_their_places(client, server, name, content, fault):
    kept = {*(server.jobs.places.root / "files").glob("*")}
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=(name, content), purpose="fine-tune")
    assert all(text in refused.value.body["message"] for text in fault)
    assert str(server.jobs.places.root) not in refused.value.body["message"]
    assert {*(server.jobs.places.root / "files").glob("*")} == kept


def test_a_large_file_is_checked_in_a_process_of_its_own(client, monkeypatch):
    monkeypatch.setattr(uploads, "LARGE", 100)
    assert upload(client).rows == len(ROWS)
    with pytest.raises(openai.BadRequestError, match=r"rows\.jsonl:25: "):
        upload(client, [*ROWS, {"prompt": "a"}])


def test_other_purposes_and_fields_are_refused_by_name(client):
    for options in ({"purpose": "batch"}, {"purpose": "fine-tune", "extra_body": {"strange": "1"}}):
        with pytest.raises(openai.BadRequestError, match=r"purpose|strange"):
            client.files.create(file=("rows.jsonl", b"{}"), **options)


def test_a_job_from_its_creation_to_an_answer(client, server, file):
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        validation_file=file.id,
        suffix="my island",
        seed=7,
        metadata={"who": "me"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}},
        },
        extra_body={"rank": 4, "targets": ["q_proj"], "tokens_per_step": 64},
    )
    assert job.status == "queued"
    assert job.fine_tuned_model is None
    assert job.settings["rank"] == 4
    done = until(client, job.id, "succeeded", "failed")
    assert done.error is None
    assert done.fine_tuned_model.startswith("ft-my-island-")
    assert done.hyperparameters.n_epochs == 2
    assert done.method.supervised.hyperparameters.batch_size == "auto"
    assert (done.seed, done.metadata, done.trained_tokens) == (7, {"who": "me"}, 30)
    assert done.finished_at >= done.created_at
    settings = server.jobs.job(job.id).settings
    assert settings["training"] == {"seed": 7, "epochs": 2.0, "tokens_per_step": 64}
    assert settings["rows"]["eval_data"] == settings["data"]
    (results,) = done.result_files
    table = client.files.content(results).text.splitlines()
    assert table[:2] == ["step,train_loss,valid_loss", "1,1.0,"]
    assert done.fine_tuned_model in [model.id for model in client.models.list()]
    answer = client.chat.completions.create(**chat(done.fine_tuned_model, max_tokens=2))
    assert answer.choices[0].message.content == f"{done.fine_tuned_model} says"
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))  # page by page
    texts = [event.message for event in events][::-1]
    assert texts[0] == f"Created fine-tuning job: {job.id}"
    assert "Step 3/3: training loss=0.3333" in texts
    assert texts[-1] == "The job has successfully completed."
    assert {event.type for event in events} == {"message", "metrics"}
    assert len({event.id for event in events}) == len(events)
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id, limit=2)
    assert [c.step_number for c in checkpoints] == [3, 2, 1]
    assert checkpoints.data[0].metrics.train_loss == pytest.approx(1 / 3)
    assert checkpoints.data[0].fine_tuned_model_checkpoint in server.jobs.served.library.names()
    matching = client.fine_tuning.jobs.list(metadata={"who": "me"})
    assert [each.id for each in matching] == [job.id]
    assert not client.fine_tuning.jobs.list(metadata={"who": "you"}).data


def test_a_job_learns_preferences(client, server):
    pairs = [
        {
            "input": {"messages": [{"role": "user", "content": "a b"}], "tools": []},
            "preferred_output": [{"role": "assistant", "content": word}],
            "non_preferred_output": [{"role": "assistant", "content": "no"}],
        }
        for word in "abc"
    ]
    with pytest.raises(openai.BadRequestError, match=r"rows\.jsonl:2: .*'input' must be an object"):
        upload(client, [pairs[0], {**pairs[1], "input": "a b"}])
    chosen = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 2}}}
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=upload(client, pairs).id, method=chosen
    )
    assert job.method.type == "dpo"
    assert job.method.dpo.hyperparameters.beta == 0.2
    assert job.method.dpo.hyperparameters.batch_size == "auto"
    assert server.jobs.job(job.id).settings["objective"] == {"objective": "dpo", "beta": 0.2}
    assert until(client, job.id, "succeeded", "failed").status == "succeeded"
    other = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=upload(client, pairs).id,
        method={"type": "dpo"},
        extra_body={"objective": "simpo", "simpo_margin": 0.5},
    )
    assert server.jobs.job(other.id).settings["objective"]["objective"] == "simpo"
    assert until(client, other.id, "succeeded", "failed").status == "succeeded"


def test_a_job_learns_from_samples(client, server):
    asks = [{"messages": [{"role": "user", "content": text}], "answer": text} for text in "abc"]
    file = upload(client, asks)
    assert file.rows == 3
    chosen = {"n_epochs": 2, "batch_size": 2, "compute_multiplier": 0.5, "eval_samples": 2}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        validation_file=file.id,
        method=reinforced(**chosen, reasoning_effort="high"),
        extra_body={"max_new_tokens": 8},
    )
    assert job.method.type == "reinforcement"
    assert job.method.reinforcement.grader.to_dict() == GRADER
    shown = job.method.reinforcement.hyperparameters
    assert (shown.n_epochs, shown.eval_interval, shown.reasoning_effort) == (2, "auto", "high")
    settings = server.jobs.job(job.id).settings
    assert settings["objective"] == {"objective": "grpo"}
    own = {"max_new_tokens": 8, "prompts_per_step": 2, "group_size": 4, "eval_answers": 2}
    assert settings["on_policy"] == own
    assert settings["rows"]["eval_data"].endswith("rows.jsonl")
    assert until(client, job.id, "succeeded", "failed").status == "succeeded"
    assert warned_of(client, job) == {"compute_multiplier", "reasoning_effort"}
    method = reinforced(eval_samples=2, eval_interval=1)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, method=method)
    assert warned_of(client, job) == {"eval_interval, eval_samples"}  # nothing to evaluate on
    # Another test lets workers wait, and this one would never end there.
    assert until(client, job.id, "succeeded", "failed").status == "succeeded"


def warned_of(client, job):
    events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
    return {event.message.split(":")[0] for event in events if event.level == "warn"}


def test_rows_of_another_kind_are_refused_before_a_job_begins(client, file):
    asks = upload(client, [{"prompt": "a", "solution": "b"}])  # as data for samples has it
    for given in ({"training_file": asks.id}, {"validation_file": asks.id}):
        body = {"model": "tiny", "training_file": file.id} | given
        with pytest.raises(openai.BadRequestError, match="prompts, as no row has") as refused:
            client.fine_tuning.jobs.create(**body)
        assert refused.value.param in given


def test_a_grader_is_tried_out(client):
    graders = client.fine_tuning.alpha.graders
    assert graders.validate(grader=GRADER).grader.to_dict() == GRADER
    with pytest.raises(openai.BadRequestError, match="never runs here"):
        graders.validate(grader={"type": "python", "name": "p", "source": "1"})
    tried = graders.run(grader=GRADER, model_sample="It is Seven.", item={"answer": "seven"})
    assert (tried.reward, tried.metadata.name, tried.sub_rewards) == (1, "right", {"right": 1})
    assert not any(tried.metadata.errors.to_dict().values())
    both = {"type": "multi", "name": "both", "graders": {"a": GRADER}, "calculate_output": "2 * a"}
    tried = graders.run(grader=both, model_sample="seven", item={"answer": "seven"})
    assert (tried.reward, tried.sub_rewards, tried.metadata.type) == (2, {"a": 1}, "multi")
    for grader, error in ((GRADER, "invalid_variable_error"), (both, "invalid_variable_error")):
        tried = graders.run(grader=grader, model_sample="seven")
        assert (tried.reward, getattr(tried.metadata.errors, error)) == (0, True)
    endless = both | {"calculate_output": "1e999 * a"}
    tried = graders.run(grader=endless, model_sample="a", item={"answer": "a"})
    assert (tried.reward, tried.metadata.errors.other_error) == (0, True)


def test_a_job_is_paused_resumed_and_cancelled(client, file, wait, server):
    jobs = client.fine_tuning.jobs
    job = jobs.create(model="tiny", training_file=file.id, extra_body={"steps": 4})
    behind = jobs.create(model="tiny", training_file=file.id)
    until_step(client, job.id, 1)
    assert jobs.retrieve(behind.id).status == "queued"
    with pytest.raises(openai.BadRequestError, match="needed by"):
        client.files.delete(file.id)
    assert jobs.pause(behind.id).status == "paused"
    assert jobs.pause(job.id).status == "paused"
    with pytest.raises(openai.BadRequestError, match="is paused"):
        jobs.pause(job.id)
    eventually(lambda: server.jobs.store.events(job.id, limit=1, kind="stopped"))
    wait.write_text("3")
    assert jobs.resume(job.id).status == "queued"
    until(client, job.id, "running")
    until_step(client, job.id, 3)
    assert jobs.cancel(job.id).status == "cancelled"
    assert jobs.cancel(behind.id).status == "cancelled"
    for refused in (jobs.cancel, jobs.resume, jobs.pause):
        with pytest.raises(openai.BadRequestError, match="is cancelled"):
            refused(job.id)
    with pytest.raises(openai.NotFoundError):
        jobs.cancel("ftjob-none")
    after = jobs.create(model="tiny", training_file=file.id, extra_body={"steps": 1})
    assert until(client, after.id, "succeeded").step == 1
    ended = jobs.retrieve(job.id)
    assert (ended.status, ended.fine_tuned_model, ended.trained_tokens) == ("cancelled", None, 30)
    texts = [event.message for event in jobs.list_events(job.id, limit=100)]
    assert "The fine-tuning job goes on." in texts
    assert len([text for text in texts if text.startswith("Step ")]) == 3


def test_a_job_that_fails_says_why(client, file):
    jobs = client.fine_tuning.jobs
    bad = jobs.create(model="tiny", training_file=file.id, extra_body={"rank": 13})
    failed = until(client, bad.id, "failed")
    assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
    assert "\n  rows.jsonl:2: not so" in failed.error.message
    assert jobs.resume(bad.id).error is None
    until(client, bad.id, "failed")
    dying = jobs.create(model="tiny", training_file=file.id, extra_body={"rank": 14})
    failed = until(client, dying.id, "failed")
    assert failed.error.code == "worker_died"
    assert "signal 9" in failed.error.message


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": {"type": "dpo", "supervised": {}}}, "supervised would do nothing with dpo"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, "beta should be"),
        ({"extra_body": {"beta": 0.3}}, "beta would do nothing with sft"),
        ({"extra_body": {"objective": "dpo"}}, "With the method supervised, objective may be sft."),
        ({"method": {"type": "dpo"}, "extra_body": {"objective": "grpo"}}, "may be dpo, ipo,"),
        ({"method": {"type": "reinforcement"}}, "The method reinforcement needs a grader"),
        ({"method": reinforced({"type": "python", "source": "1", "name": "p"})}, "never runs here"),
        ({"method": reinforced(GRADER | {"operation": "equal"})}, "operation is 'equal', and may"),
        ({"method": reinforced(eval_interval=0)}, "eval_interval should be"),
        ({"method": reinforced(beta=1)}, "beta is not supported"),
        ({"method": reinforced(compute_multiplier=9)}, "group_size is 72, and may be 64"),
        ({"method": reinforced(), "extra_body": {"resample": 17}}, "resample is 17, and may be 16"),
        (
            {"method": reinforced(batch_size=2), "extra_body": {"prompts_per_step": 2}},
            "batch_size and prompts_per_step",
        ),
        ({"method": reinforced(), "extra_body": {"reward": ["a:b"]}}, "reward is no"),
        ({"method": reinforced(), "extra_body": {"objective": "dpo"}}, "may be grpo, rloo"),
        ({"extra_body": {"group_size": 4}}, "group_size would do nothing with sft"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        ({"extra_body": {"ranks": 4}}, "ranks is no parameter; did you mean 'rank'?"),
        ({"extra_body": {"rank": 0}}, "rank is 0, but must be"),
        ({"extra_body": {"rank": "8"}}, "rank should be a valid integer"),
        ({"extra_body": {"eval_every": 3, "eval_rows": 0}}, "eval_every would do nothing"),
        ({"extra_body": {"eval_data": "/etc/passwd"}}, "eval_data is no parameter"),
        # A server asks no address for a client.
        ({"extra_body": {"teacher": "http://localhost/v1"}}, "teacher is no parameter"),
        ({"extra_body": {"teacher_model": "a"}}, "teacher_model is no parameter"),
        ({"extra_body": {"epochs": 1}, "hyperparameters": {"n_epochs": 1}}, "n_epochs and epochs"),
        ({"hyperparameters": {"n_epochs": 0}}, "n_epochs should be"),
        ({"training_file": "file-none"}, "There is no file 'file-none'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(client, file, options, text):
    body = {"model": "tiny", "training_file": file.id} | options
    with pytest.raises(openai.APIStatusError) as refused:
        client.fine_tuning.jobs.create(**body)
    assert refused.value.status_code in (400, 404)
    assert text in refused.value.body["message"]


def test_only_holders_of_the_admin_key_train(client, server):
    for key in ("none", "another-key-of-some-length"):
        other = client_of(server, key)
        for ask in (other.files.list, other.fine_tuning.jobs.list):
            with pytest.raises(openai.AuthenticationError):
                ask()
        with pytest.raises(openai.AuthenticationError):
            upload(other)
    status, _, reply = call(server.url, "/v1/files", {"purpose": "fine-tune"}, headers=AS_ADMIN)
    assert (status, reply["error"]["type"]) == (415, "invalid_request_error")


def test_nothing_of_training_goes_without_the_admin_key(server):
    for path in ("files", "fine_tuning/jobs"):
        assert call(server.url, f"/v1/{path}")[0] == 401
    for path in ("jobs/x/adapter", "merges?model=x", "merges/model?model=x"):
        assert call(server.url, f"/api/{path}")[0] == 401
    for path in ("/v1/fine_tuning/jobs", "/api/rows", "/api/plan", "/api/merges"):
        assert call(server.url, path, {})[0] == 401


def test_each_number_of_samples_is_bounded():
    numbers = {field.name for field in fields(OnPolicy) if field.type == "int"}
    assert numbers - {"overlong_margin"} == {*MOST_OF_SAMPLES}  # which max_new_tokens bounds
