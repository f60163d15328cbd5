"""What else than low-rank adapters may train: a frozen, validated value that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from veneer.errors import ConfigError

MethodName = Literal["lora", "full", "freeze", "prefix", "prompt"]
# Peak learning rates of AdamW for a whole run, as the methods' papers and PEFT's guides have them.
LEARNING_RATES: dict[MethodName, float] = {
    "lora": 2e-4,
    "full": 2e-5,
    "freeze": 1e-4,
    "prefix": 1e-2,
    "prompt": 3e-2,
}
# Settings that belong to a method, and what they are unless given.
OWN: dict[str, dict[str, object]] = {
    "freeze": {"trained_blocks": 2, "train_head": False, "train_norms": False},
    "prefix": {"virtual_tokens": 20, "prefix_mlp": None},
    "prompt": {"virtual_tokens": 20, "prompt_text": None},
}


@dataclass(frozen=True)
class Method:
    """What trains. Raises ConfigError, which lists everything that is wrong at once."""

    method: MethodName = "lora"
    """What trains: low-rank adapters, all weights (full), the last blocks (freeze), or virtual
    tokens: their keys and values in each layer (prefix), or their embeddings (prompt)."""
    trained_blocks: int | None = None
    """Blocks that freeze trains, the last ones; 2 unless given."""
    train_head: bool = False
    """With freeze, train the output head too, and the embedding where the two are one weight."""
    train_norms: bool = False
    """With freeze, train the norms of all blocks too, and the last one."""
    virtual_tokens: int | None = None
    """Virtual tokens of prefix and prompt; 20 unless given."""
    prefix_mlp: int | None = None
    """With prefix, let an MLP of this width make the keys and values while training."""
    prompt_text: str | None = None
    """With prompt, start from this text's embeddings; from words drawn at random unless given."""

    def __post_init__(self) -> None:
        problems = []
        if self.method not in get_args(MethodName):
            problems.append(f"method is {self.method!r}, but must be one of {_names()}")
        own = OWN.get(self.method, {})
        for name in ("trained_blocks", "virtual_tokens", "prefix_mlp"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and value >= 1):
                problems.append(f"{name} is {value!r}, but must be a whole number of at least 1")
        for name in ("train_head", "train_norms"):
            if not isinstance(value := getattr(self, name), bool):
                problems.append(f"{name} is {value!r}, but must be true or false")
        if not isinstance(self.prompt_text, str | None):
            problems.append(f"prompt_text is {self.prompt_text!r}, but must be a text")
        for settings in OWN.values():
            for name in settings:
                if getattr(self, name) and name not in own:
                    problems.append(f"{name} would do nothing with {self.method}")
        if problems:
            raise ConfigError("This method cannot be: " + "; ".join(dict.fromkeys(problems)) + ".")
        for name, usual in own.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)

    @property
    def replaces_weights(self) -> bool:
        """Whether the base's own weights train, so that they are the base's no longer."""
        return self.method in ("full", "freeze")


def is_virtual(config: object) -> bool:
    """Return whether a configuration is of virtual tokens, which are no weights of the base."""
    return isinstance(config, Method) and config.method in ("prefix", "prompt")


def in_words(config: Method) -> str:
    """Return what a method trains, for people."""
    match config.method:
        case "freeze":
            beside = ["all norms"] * config.train_norms + ["the head"] * config.train_head
            return " and ".join([f"the last {config.trained_blocks} blocks", *beside])
        case "prefix":
            return f"keys and values of {config.virtual_tokens} virtual tokens"
        case "prompt":
            return f"embeddings of {config.virtual_tokens} virtual tokens"
        case _:
            return "all weights"


def _names() -> str:
    return ", ".join(get_args(MethodName))
