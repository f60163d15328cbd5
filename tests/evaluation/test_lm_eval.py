"""Tasks of EleutherAI's harness: our engine's numbers are those of the harness's own model."""

import copy
import json
import re

import pytest
import torch

import veneer
from support.closeness import assert_no_further
from support.random_adapters import shake, tokenizer
from support.tiny_models import VOCAB, tiny
from veneer.models.load import Base

pytestmark = pytest.mark.slow  # importing the harness takes seconds

DATA = """\
dataset_path: json
dataset_kwargs:
  data_files: {test: rows.jsonl}
test_split: test
"""
TASKS = {
    "choice": """\
output_type: multiple_choice
doc_to_text: "{{q}} ="
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - metric: acc
""",
    "text": """\
output_type: generate_until
doc_to_text: "{{q}} ="
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["A", "!"], max_gen_toks: 9}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
""",
    "rolling": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}} {{choices[1]}} and more words, beyond the length of a context"
metric_list:
  - metric: byte_perplexity
""",
}


@pytest.fixture
def tasks(tmp_path):
    """A directory of tasks over rows beside them."""
    home = tmp_path / "tasks"
    home.mkdir()
    rows = [
        {"q": f"{i} + {j}", "choices": [str(i + j), str(i + j + 1), "no idea"], "gold": 0}
        for i in range(3)
        for j in range(3)
    ]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (home / f"{name}.yaml").write_text(f"task: {name}\n{DATA}{text}")
    return home


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Keep what the harness's library of data sets writes out of the user's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def adapted(home):
    """Return a base, an adapter over it in a directory, and the model with the adapter."""
    base = Base("tiny", tiny("llama"), tokenizer(VOCAB))
    base.model.generation_config.eos_token_id = base.tokenizer.eos_token_id
    model = shake(veneer.attach(copy.deepcopy(base.model), veneer.LoRA(rank=2)), size=0.3)
    veneer.save(model, home)
    return base, home, model


def asked_of(directory):
    """Return the requests of each kind that the tasks make."""
    from veneer.evaluation.tasks import TaskSettings, _load

    loaded = _load(TaskSettings(directory=directory))["tasks"]
    requests = {}
    for name, task in loaded.items():
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=None, rank=0, world_size=1)
        requests[name] = task.instances
    return requests


@pytest.mark.parametrize("with_adapter", [False, True])
def test_our_numbers_are_those_of_the_harnesss_own_model(tmp_path, tasks, caches, with_adapter):
    from lm_eval.models.huggingface import HFLM

    from veneer.evaluation.harness_model import HarnessModel

    base, home, model = adapted(tmp_path / "adapter")
    plain = model if with_adapter else base.model
    ours = HarnessModel(base, home if with_adapter else None)
    theirs, wide = (
        HFLM(pretrained=each, tokenizer=base.tokenizer, batch_size=4, max_length=ours.max_length)
        for each in (plain, copy.deepcopy(plain).double())
    )
    asked = asked_of(tasks)
    one, other, reference = (each.loglikelihood(asked["choice"]) for each in (ours, theirs, wide))
    log_ps = [torch.tensor([log_p for log_p, _ in each]) for each in (one, other, reference)]
    assert_no_further(*log_ps, "log p of choices")
    assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
    rolling = [
        torch.tensor(each.loglikelihood_rolling(asked["rolling"])) for each in (ours, theirs, wide)
    ]
    assert_no_further(*rolling, "log p of texts")
    texts = ours.generate_until(asked["text"])
    assert texts == theirs.generate_until(asked["text"])
    assert len(set(texts)) > 1
    assert not veneer.adapters(base.model)


def test_a_table_has_each_side_and_json_has_all(tmp_path, tasks, caches, minigpt_home, capsys):
    from veneer.cli.app import run

    base = veneer.load_base(str(minigpt_home), dtype="float32")
    for number, name in enumerate(("one", "two")):
        model = veneer.attach(copy.deepcopy(base.model), veneer.LoRA(rank=2))
        veneer.save(shake(model, seed=number), tmp_path / name)
    # Relative paths are from here, however the harness's are from the directory of tasks.
    sides = [f"--adapter={name}={name}" for name in ("one", "two")]
    command = ["evaluate", str(minigpt_home), *sides, "--with-base", "--tasks-from", tasks.name]
    command += ["--limit", "4", "--dtype", "float32"]
    assert run(command) == 0
    table = capsys.readouterr().out
    assert all(text in table for text in ("base", "one", "two", "choice", "acc", "±"))
    assert run([*command, "--json", "--tasks", "choice,rolling"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [*results] == ["base", "one", "two"]
    assert {m["task"] for m in results["one"]} == {"choice", "rolling"}
    assert results["base"] != results["one"]


@pytest.fixture
def refused(minigpt_home, capsys):
    """Run `veneer evaluate`, which must fail with one error, and return the error."""
    from veneer.cli.app import run

    def evaluate(*flags):
        assert run(["evaluate", str(minigpt_home), *map(str, flags)]) == 2
        error = capsys.readouterr().err
        assert len(re.findall(r"\bError:", error)) == 1  # and not its ParserError or another
        assert "Traceback" not in error
        return " ".join(error.split())

    return evaluate


def test_what_cannot_be_evaluated_is_named(tasks, caches, refused):
    error = refused("--tasks-from", tasks, "--tasks", "choise,text")
    assert "'choise'; did you mean 'choice'?" in error
    (tasks / "broken.yaml").write_text("task: [")
    (tasks / "twice.yaml").write_text("task: text")
    error = refused("--tasks-from", tasks)
    assert "broken.yaml: ParserError" in error
    assert "twice.yaml" in error
    assert "has a task of this name already, 'text'" in error
    (tasks / "broken.yaml").unlink()
    (tasks / "twice.yaml").unlink()
    (tasks / "rows.jsonl").unlink()
    assert "cannot be read" in refused("--tasks-from", tasks)


def test_files_of_tasks_run_nothing_unless_a_person_allows_it(tasks, caches, refused):
    from veneer.evaluation.tasks import TaskSettings, check_tasks

    ran = tasks / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\ndef same(rows): return rows\n"
    (tasks / "own.py").write_text(code)
    choice = (tasks / "choice.yaml").read_text()
    asking = {
        "coded": f"{choice}process_docs: !function own.same\n",
        "escaping": choice.replace(
            "{{q}}", f"{{{{ cycler.__init__.__globals__.os.mkdir({str(ran)!r}) }}}}"
        ),
        "fetched": choice.replace("metric: acc", "metric: of_the_hub"),
    }
    for name, text in asking.items():
        (tasks / f"{name}.yaml").write_text(text.replace("task: choice", f"task: {name}"))
    assert "--allow-code" in refused("--tasks-from", tasks, "--tasks", "coded")
    assert "SecurityError" in refused("--tasks-from", tasks, "--tasks", "escaping")
    assert "none is run from there" in refused("--tasks-from", tasks, "--tasks", "fetched")
    assert not ran.exists()
    assert check_tasks(TaskSettings(["coded"], tasks, allow_code=True)) == ["coded"]
    assert ran.exists()
