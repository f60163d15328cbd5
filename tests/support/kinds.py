"""The kinds of adapters that each law is tried on, as one table, and which of them a law takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import veneer
from support import peft_cases
from support.kind import Kind
from support.thinned import thinned


def _lora(name: str, architecture: str, **options: Any) -> Kind:
    settings = {k: options.pop(k) for k in list(options) if k in Kind.__dataclass_fields__}
    return Kind(name, architecture, lora=options, **settings)


def _peft(case: str, trains: str = r"\.adapters\.", **options: Any) -> Kind:
    architecture = peft_cases.CASES[case][0]
    return Kind(case, architecture, peft=case, trains=trains, mixes_rows=False, **options)


def _method(name: str, architecture: str, trains: str, *, bits: int | None = None, **options: Any):
    method = veneer.Method(**options)
    able = method.replaces_weights
    return Kind(
        name,
        architecture,
        bits,
        method=method,
        trains=trains,
        identity=able,
        merges=able,
        mixes_rows=False,
    )


_VIRTUAL = r"^veneer_virtual\."
_STACKS = ["experts.gate_up_proj", "experts.down_proj"]
_MIXED = {
    "beside": ({"rank": 2}, {"rank": 1, "targets": "everything"}),
    "weights": (0.7, -1.3, 2.0),
}

# The names of kinds whose tensors are those of another kind, in other layers or other values.
ALIKE = {
    *(
        "attention",
        "mlp",
        "head",
        "head, tied",
        "embedding, tied",
        "embedding and head",
        "patterns",
    ),
    *("tokens and positions", "rslora", "olora", "dora from olora", "dora from lora_ga"),
    *("mix of pissa", "saved head", "bias lora_only", "both biases", "lora_bias alone"),
    *("tokens, scaled", "tokens of both", "freeze", "freeze, head"),
}

KINDS: list[Kind] = [
    # Low-rank adapters on every layer and the embedding: each architecture, dense and quantized.
    _lora("lora", "falcon", targets="everything"),
    _lora("lora", "gemma", targets="everything"),
    _lora("lora", "gpt2", targets="everything"),
    _lora("lora", "gpt_neox", targets="everything"),
    _lora("lora", "llama", targets="everything"),
    _lora("lora", "minigpt", targets="everything"),
    _lora("lora", "mistral", targets="everything"),
    _lora("lora", "phi", targets="everything"),
    _lora("lora", "qwen2", targets="everything"),
    _lora("lora", "qwen3", targets="everything"),
    _lora("lora", "falcon", bits=4, targets="everything"),
    _lora("lora", "gemma", bits=8, targets="everything"),
    _lora("lora", "gpt2", bits=4, targets="everything"),
    _lora("lora", "gpt_neox", bits=8, targets="everything"),
    _lora("lora", "llama", bits=4, targets="everything"),
    _lora("attention", "gpt2", bits=8, targets="attention"),  # layers with biases under no adapter
    _lora("lora", "minigpt", bits=4, targets="everything"),
    _lora("lora", "mistral", bits=8, targets="everything"),
    _lora("lora", "phi", bits=4, targets="everything"),
    _lora("lora", "qwen2", bits=8, targets="everything"),
    _lora("lora", "qwen3", bits=4, targets="everything"),
    # Fewer layers, and such as touch the tie between embedding and head.
    _lora("attention", "gpt_neox", targets="attention", init="gaussian"),
    _lora("q and v", "mistral", targets="qv", dropout=0.5),
    _lora("mlp", "qwen3", targets="mlp", init="kaiming", dropout=0.5),
    _lora("embedding, tied", "llama", targets="embedding"),
    _lora("head, tied", "llama", targets="lm_head"),
    _lora("head", "qwen2", targets="lm_head"),
    _lora("embedding and head, tied", "llama", targets=["embed_tokens", "lm_head"]),
    _lora("embedding and head", "qwen2", targets=["embed_tokens", "lm_head"]),
    _lora("tokens and positions", "gpt2", targets=["wte", "wpe"]),
    # Scales and starts.
    _lora("rslora", "granite", rslora=True, alpha=3),
    _lora(
        "patterns",
        "olmo2",
        rank_pattern={r".*\.1\..*": 5},
        alpha_pattern={r".*\.0\..*": 1.5},
    ),
    _lora("pissa", "mistral", init="pissa"),
    _lora("pissa", "qwen2", bits=4, init="pissa"),
    _lora("olora", "phi3", init="olora"),
    _lora("olora", "gpt2", bits=8, init="olora"),
    _lora("lora_ga", "qwen3", init="lora_ga"),
    _lora("lora_ga", "llama", bits=4, init="lora_ga"),
    _lora("loftq", "llama", bits=4, init="loftq", on_disk=True, identity=False),
    _lora("lora_fa", "phi", lora_fa=True, trains=r"\.lora_B$"),
    _lora("lora+", "llama", training={"lora_plus_ratio": 6.0}),
    # DoRA.
    _lora("dora", "llama", dora=True, targets="everything"),
    _lora("dora", "gpt2", dora=True, targets="everything"),
    _lora("dora", "gemma", dora=True, targets="everything"),
    _lora("dora", "falcon", dora=True),
    _lora("dora", "gemma2", dora=True),
    _lora("dora", "qwen2", bits=4, dora=True, dropout=0.5),
    _lora("dora", "phi", bits=8, dora=True),
    _lora("dora from pissa", "llama", dora=True, init="pissa"),
    _lora("dora from olora", "minigpt", dora=True, init="olora"),
    _lora("dora from lora_ga", "mistral", dora=True, init="lora_ga"),
    # Latent attention.
    _lora("lora", "minicpm3"),
    _lora("dora", "minicpm3", bits=4, dora=True, dropout=0.5),
    # Several adapters at a time.
    _lora("mix", "llama", **_MIXED),
    _lora("mix", "gemma", **_MIXED),
    _lora("mix", "mistral", bits=4, **_MIXED),
    _lora("mix of dora", "gpt2", dora=True, **_MIXED),
    _lora("mix of dora", "llama", bits=4, dora=True, **_MIXED),
    _lora("mix of pissa", "qwen2", init="pissa", **_MIXED),
    # Other decoders, convolutions, and stacks of experts.
    _lora("lora", "gemma3"),
    _lora("lora", "mamba", mixes_rows=False),  # whose code reads the weight of dt_proj
    _lora("lora", "mamba2"),
    _lora("lora", "falcon_h1"),
    _lora("conv", "vit", targets=["projection", "q_proj"], mixes_rows=False),
    _lora("conv, dora", "vit", targets=["projection"], dora=True, mixes_rows=False),
    _lora("conv", "convnext", targets=["re:patch_embed|pwconv1"], mixes_rows=False),
    _lora("experts", "mixtral", targets=["q_proj", *_STACKS]),
    _lora("experts", "qwen2_moe", targets=_STACKS, rslora=True),
    _lora("experts", "qwen3_moe", targets=["down_proj", *_STACKS]),
    _lora("experts, all", "qwen3_moe", targets="all", expert_rank=3),
    _lora("experts, one A", "mixtral", targets=_STACKS, shared_expert_a=True),
    _lora("experts, transposed", "gpt_oss", targets=["q_proj", *_STACKS]),
    _lora("experts", "qwen2_moe", bits=4, targets=["q_proj", *_STACKS]),
    _lora("experts, transposed", "gpt_oss", bits=8, targets="all"),
    # Bases that were published quantized.
    _lora("over fp8", "qwen2", bits=8, published="fp8"),
    _lora(
        "over mxfp4",
        "gpt_oss",
        bits=4,
        published="mxfp4",
        targets=["q_proj", *_STACKS],
    ),
    # Modules to save, biases, and rows of single tokens.
    _peft("saved norms and an mlp", r"\.adapters\.|\.1\.mlp\.|norm\.weight$"),
    _peft("saved head", r"\.adapters\.|^lm_head\."),
    _peft("saved as one", r"\.adapters\.|embed_tokens\.weight$|^lm_head\."),
    _peft("saved and biases", r"\.adapters\.|bias$|dense_4h_to_h\.weight$"),
    _peft("bias all", r"\.adapters\.|bias$"),
    _peft("bias lora_only", r"\.adapters\.|[qv]_proj\.original\.bias$"),
    _peft("both biases", r"\.adapters\.|q_proj\.original\.bias$"),
    _peft("lora_bias"),
    _peft("lora_bias alone", merges=False),  # its layers have no place for a bias
    _peft("tokens", r"\.adapters\.|\.rows$"),
    _peft("tokens, tied", r"\.adapters\.|\.rows$"),
    _peft("tokens, scaled", r"\.adapters\.|\.rows$"),
    _peft("tokens of both", r"\.adapters\.|\.rows$"),
    _peft("tokens of both, tied no more", r"\.adapters\.|\.rows$"),
    _peft("all at once", r"\.adapters\.|\.rows$|norm\.weight$|[qkv]_proj\.original\.bias$"),
    _lora("new tokens", "qwen2", new_tokens=True, trains=r"\.adapters\.|\.rows$", mixes_rows=False),
    _lora("new tokens", "llama", new_tokens=True, trains=r"\.adapters\.|\.rows$", mixes_rows=False),
    # From an invocation on.
    _lora("activated", "llama", invocation=(7, 5), merges=False, mixes_rows=False),
    _lora(
        *("activated", "qwen2"),
        bits=4,
        dropout=0.5,
        invocation=(5,),
        merges=False,
        mixes_rows=False,
    ),
    # Virtual tokens.
    _method("prefix", "llama", _VIRTUAL, method="prefix", virtual_tokens=5),
    _method("prefix", "falcon", _VIRTUAL, method="prefix", virtual_tokens=5),
    _method("prefix", "gpt2", _VIRTUAL, bits=4, method="prefix", virtual_tokens=5),
    _method("prefix, mlp", "qwen2", _VIRTUAL, method="prefix", virtual_tokens=5, prefix_mlp=6),
    _method("prefix, mlp", "mistral", _VIRTUAL, method="prefix", virtual_tokens=3, prefix_mlp=6),
    _method("prompt", "mistral", _VIRTUAL, method="prompt", virtual_tokens=5),
    _method("prompt", "minigpt", _VIRTUAL, method="prompt", virtual_tokens=5),
    _method("prompt", "llama", _VIRTUAL, bits=8, method="prompt", virtual_tokens=5),
    # The base's own weights.
    _method("full", "llama", r"", method="full"),
    _method("full", "falcon", r"", method="full"),
    _method("full", "phi", r"", method="full"),
    _method("freeze", "gpt_neox", r"\.1\.", method="freeze", trained_blocks=1),
    _method("freeze, all", "minigpt", r"layers\.", method="freeze", trained_blocks=2),
    _method(
        "freeze, head",
        "qwen2",
        r"\.1\.|^lm_head",
        method="freeze",
        trained_blocks=1,
        train_head=True,
    ),
    _method(
        "freeze, tied head",
        "gpt2",
        r"\.1\.|wte",
        method="freeze",
        trained_blocks=1,
        train_head=True,
    ),
    _method(
        "freeze, norms", "gemma", r"\.1\.|norm", method="freeze", trained_blocks=1, train_norms=True
    ),
]


READ_BITS = ("lora", "dora", "pissa", "experts", "experts, transposed")
# Of kinds that are alike, the one that has most in it: in every run, every law is tried on it, and
# of those that train it one of two (`in_share`).
CORE = {
    *("lora, llama", "lora, falcon", "lora, mamba2", "lora, llama, 4 bits", "lora, gemma, 8 bits"),
    *("q and v, mistral", "dora, llama", "dora, qwen2, 4 bits", "mix of dora, gpt2"),
    *("pissa, mistral", "lora_ga, qwen3", "loftq, llama, 4 bits", "lora_fa, phi", "lora+, llama"),
    *("conv, dora, vit", "experts, all, qwen3_moe", "experts, transposed, gpt_oss"),
    *("over mxfp4, gpt_oss, 4 bits", "saved as one, llama", "lora_bias, qwen2", "bias all, phi"),
    *("tokens of both, tied no more, llama", "all at once, qwen2", "new tokens, qwen2"),
    *("activated, llama", "prefix, llama", "prefix, mlp, qwen2", "prompt, mistral"),
    *("full, llama", "freeze, tied head, gpt2"),
}
SHARES = 6


def is_typical(kind: Kind) -> bool:
    """Return whether a kind is the first of its name, plain LoRA over a dense base, or the first of
    those over a base of so many bits that read its quantized weights in a way of their own."""
    over_bits = kind.bits is not None and kind.name in READ_BITS
    first = is_first_of(kind, "name", "bits" if over_bits else "name")
    return first or (kind.name == "lora" and not kind.bits)


def in_share(turn: int, *, trains: bool = False) -> Callable[[Kind], bool]:
    """Return which kinds a law takes in every run: the core, and its share of the other typical
    ones. Laws take turns, so that each kind is tried on a sixth of them in every run, and on all
    among the slow proofs. A law that trains each kind is dear, and takes every other one of the
    core: there is another such law for the rest."""
    core = [kind for kind in KINDS if str(kind) in CORE]
    others = [kind for kind in KINDS if is_typical(kind) and str(kind) not in CORE]
    taken = [*(core[turn % 2 :: 2] if trains else core), *others[turn % SHARES :: SHARES]]
    names = {str(kind) for kind in taken}
    return lambda kind: str(kind) in names


def has_own_tensors(kind: Kind) -> bool:
    """Return whether a kind trains or keeps tensors that no kind of another name has, but in other
    layers or from another start."""
    return kind.name not in ALIKE


def each_kind(
    able: Callable[[Kind], bool] = lambda kind: True, *, fast: Callable[[Kind], bool]
) -> pytest.MarkDecorator:
    """Return a decorator that runs a test with every kind that is able to be tested: with those
    that are not `fast` among the slow proofs, as the law holds for another kind like it."""
    kinds = thinned([kind for kind in KINDS if able(kind)], fast)
    return pytest.mark.parametrize("kind", kinds, ids=str)


def is_first_of(kind: Kind, *fields: str) -> bool:
    """Return whether no kind before it has the same values in these fields."""
    alike = (each for each in KINDS if all(getattr(each, f) == getattr(kind, f) for f in fields))
    return next(alike) is kind


def is_first(kind: Kind) -> bool:
    """Return whether a kind reads tokens and is the first of its name, or plain LoRA over a dense
    base, of which there is one for each architecture."""
    alike = [each for each in KINDS if each.name == kind.name and each.reads_tokens]
    return kind in alike[:1] or (kind in alike and kind.name == "lora" and not kind.bits)
