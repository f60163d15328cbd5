"""What trains, if it is no low-rank adapter: a frozen, validated value that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Literal

from veneer.checks import BOOLEAN, TEXT, check_config, one_of, whole_number

MethodName = Literal["lora", "full", "freeze", "prefix", "prompt"]
# Settings that only some methods have, with their defaults.
METHOD_DEFAULTS: dict[str, dict[str, object]] = {
    "freeze": {"trained_blocks": 2, "train_head": False, "train_norms": False},
    "prefix": {"virtual_tokens": 20, "prefix_mlp": None},
    "prompt": {"virtual_tokens": 20, "prompt_text": None},
}


@dataclass(frozen=True)
class Method:
    """What trains. Raises ConfigError, which lists everything that is wrong at once."""

    method: MethodName = "lora"
    """What trains: low-rank adapters, all weights (full), the last blocks (freeze), or virtual
    tokens: their keys and values in each layer (prefix), or their embeddings (prompt). On the
    command line, qlora is lora with --bits 4, and dora is lora with --dora."""
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
    """With prompt, start from this text's embeddings; from tokens drawn at random unless given."""

    def __post_init__(self) -> None:
        own = METHOD_DEFAULTS.get(self.method, {})
        check_config(
            self,
            opening="This method cannot be",
            rules={
                "method": one_of(MethodName),
                **dict.fromkeys(
                    ("trained_blocks", "virtual_tokens", "prefix_mlp"), whole_number(1)
                ),
                **dict.fromkeys(("train_head", "train_norms"), BOOLEAN),
                "prompt_text": TEXT,
            },
            contradictions={
                f"{name} would do nothing with {self.method}": bool(getattr(self, name))
                for name in dict.fromkeys(chain(*METHOD_DEFAULTS.values()))
                if name not in own
            },
        )
        for name, usual in own.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)

    @property
    def replaces_weights(self) -> bool:
        """Whether the base's own weights train, so that they are the base's no longer."""
        return self.method in ("full", "freeze")


def is_virtual(config: object) -> bool:
    """Return whether a configuration trains virtual tokens."""
    return isinstance(config, Method) and config.method in ("prefix", "prompt")


def description(config: Method) -> str:
    """Return what a method trains, as text for people."""
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
