"""vLLM reads what Veneer writes and answers as Veneer does. It needs an environment of its own:
make proof-vllm."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import veneer
from support.random_adapters import ids
from support.vllm import MARKS, Vllm
from support.vllm_sides import NEW, WIDER, Sides, both_sides, tiny_base, written

pytestmark = MARKS
TEXTS = ("The capital of France is", "To boil an egg, you", "My favourite fruit is")

# What check promises over a base whose class in vLLM adapts its embedding and head.
SERVED: dict[str, dict[str, Any]] = {
    "attention": {"targets": "attention"},
    "q and v of rank 4": {"targets": "qv", "rank": 4},
    "k alone": {"targets": "k_proj"},
    "up alone": {"targets": "up_proj"},
    "mlp of rank 16": {"targets": "mlp", "rank": 16},
    "all": {"targets": "all", "alpha": 24},
    "all of rank 1": {"targets": "all", "rank": 1, "alpha": 8},
    "rslora": {"targets": "all", "rslora": True, "alpha": 8},
    "patterns": {
        "targets": "all",
        "rank_pattern": {r".*\.1\..*": 5, "q_proj": 12},
        "alpha_pattern": {r".*\.0\..*": 1.5, "down_proj": 40},
    },
    "patterns of rslora": {
        "targets": "all",
        "rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"o_proj": 2},
    },
    "the last block": {"targets": "all", "layers": "-1", "alpha": 64},
    "pissa": {"targets": "attention", "init": "pissa"},
    "olora": {"targets": "qv", "init": "olora"},
    "embedding": {"targets": ["q_proj", "embed_tokens"]},
    "head": {"targets": ["q_proj", "lm_head"]},
    "embedding and head": {"targets": ["embed_tokens", "lm_head"]},
}
RANKS = (1, 3, 16, 17, 48, 64, 100, 256, 320, 512)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> tuple[Path, dict[str, Path], list[list[int]]]:
    """The base's directory, an adapter of each kind with values that change the answers, and
    prompts."""
    home = tmp_path_factory.mktemp("smollm2")
    base = veneer.load_base("smollm2-135m", dtype="float32")
    veneer.write_model(base.model, base.tokenizer, home / "base")
    adapters = {}
    for n, (name, options) in enumerate(SERVED.items()):
        size = 0.04 if options["targets"] in ("all", "mlp") else 0.1
        adapters[name] = written(base.model, home / str(n), size=size, seed=n, **options)
    return home / "base", adapters, base.tokenizer(list(TEXTS))["input_ids"]


@pytest.fixture(scope="module", params=WIDER)
def side(request, smollm2) -> Iterator[Sides]:
    made = both_sides(smollm2[0], smollm2[1], request.param, smollm2[2], max_lora_rank=16)
    yield made
    made.vllm.close()


def test_every_kind_that_check_promises_answers_there_as_here(side, capsys):
    said = side.answers_agree()
    with capsys.disabled():
        print(said)


@pytest.fixture(scope="module")
def highest(tmp_path_factory) -> Iterator[Sides]:
    """A tiny base, for which vLLM takes the highest rank that it has a flag for."""
    base = tiny_base(tmp_path_factory.mktemp("tiny") / "base")
    model = veneer.load_base(base, dtype="float32").model
    adapters = {
        f"rank {rank}": written(
            model, base.parent / str(rank), rank=rank, targets="all", size=rank**-0.25 / 4
        )
        for rank in RANKS
    }
    prompts = ids(2, 5).tolist()
    made = both_sides(base, adapters, "float32", prompts, max_lora_rank=512, max_model_len=64)
    yield made
    made.vllm.close()


def test_every_rank_answers_there_as_here(highest, capsys):
    said = highest.answers_agree()
    with capsys.disabled():
        print(said)


@pytest.mark.parametrize("slots", [3, 2])
def test_the_base_beside_adapters_needs_a_slot_that_is_free(slots, highest, tmp_path):
    """On processors vLLM takes the base for the last slot: its place in the list of slots is -1
    (vllm/lora/ops/torch_ops/lora_ops.py). Should the second case fail, docs/serving-elsewhere.md
    can say that this is mended."""
    names, prompts = ("rank 3", "rank 16"), highest.prompts
    base = highest.adapters["rank 3"].parent / "base"
    vllm = Vllm(base, tmp_path / "log", dtype="float32", max_loras=slots, max_model_len=64)
    for name in names:
        assert vllm.load(name, highest.adapters[name]) is None
    (alone,) = vllm.answer([(None, prompts[0])], new=NEW)
    beside, *_ = vllm.answer([(None, prompts[0]), *((name, prompts[1]) for name in names)], new=NEW)
    vllm.close()
    assert (beside[0] == alone[0]) == (slots > len(names))
