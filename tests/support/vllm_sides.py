"""The same bases and adapters in Veneer and in vLLM, and how near their answers are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from support.random_adapters import shake, tokenizer
from support.tiny_models import SHAPE, with_large_weights
from support.vllm import Vllm
from veneer.formats.runtimes.check import check

NEW = 12  # tokens of an answer
WIDER = {"bfloat16": torch.float32, "float32": torch.float64}


def written(
    model: Any, place: Path, *, size: float = 0.1, seed: int = 0, keep: bool = False, **options: Any
) -> Path:
    veneer.attach(model, veneer.LoRA(**{"rank": 8} | options), seed=seed)
    veneer.save(
        _moved(model, seed) if "init" in options else shake(model, seed=seed, size=size),
        place,
        format="peft",
    )
    if not keep:
        veneer.detach(model)
    return place


def _moved(model: Any, seed: int) -> Any:
    """Move A and B from where their start put them, as training does."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=draw))
    return model


def tiny_base(place: Path) -> Path:
    """Write a random Llama whose heads are of a width that vLLM computes."""
    heads = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    torch.manual_seed(0)
    model = with_large_weights(LlamaForCausalLM(LlamaConfig(**SHAPE | heads)))
    veneer.write_model(model, tokenizer(), place)
    return place


@dataclass(frozen=True)
class Sides:
    """A base of ours in the type that vLLM computes in and in a wider one, with adapters loaded,
    and vLLM over the same files."""

    ours: Any
    wide: Any
    vllm: Vllm
    adapters: Mapping[str, Path]
    prompts: list[list[int]]

    def answers_agree(self) -> str:
        """Let both go on from every prompt with every adapter and without, in one call, so that
        batches mix them. Assert that vLLM is no further from the wider type than we are, times 2,
        that every adapter acts, and that its tokens are our likeliest but for ties."""
        asked = [(name, prompt) for prompt in self.prompts for name in (None, *self.adapters)]
        given = self.vllm.answer(asked, new=NEW)
        counted, ties, problems = 0, [], []
        for name in (None, *self.adapters):
            rows = [
                (prompt, *answer)
                for (who, prompt), answer in zip(asked, given, strict=True)
                if who == name
            ]
            ours, wide = _says(self.ours, name, rows), _says(self.wide, name, rows)
            theirs = _theirs(rows, wide)
            noise = _rms(ours - wide, theirs)
            slack = 1e-6 * _rms(wide, theirs)
            if (error := _rms(theirs - wide, theirs)) > 2 * noise + slack:
                problems.append(f"{name}: vLLM is {error:.3g} off, where we are {noise:.3g}")
            if name is not None:
                effect = _rms(_says(self.wide, None, rows) - wide, theirs)
                if effect < 4 * noise:
                    problems.append(f"{name} changes {effect:.3g}, which {noise:.3g} hides")
            tokens = torch.tensor([tokens for _, tokens, _ in rows])
            likeliest = ours.argmax(-1)
            for row, at in (likeliest != tokens).nonzero().tolist():
                margin = abs(
                    float(wide[row, at, likeliest[row, at]] - wide[row, at, tokens[row, at]])
                )
                if margin > 6 * noise:
                    problems.append(f"{name}: another token by {margin:.3g}, noise {noise:.3g}")
                ties.append(
                    f"{name}: {margin:.3g} apart, where rounding moves tokens by {noise:.3g}"
                )
            counted += tokens.numel()
        assert not problems, problems
        dtype = str(self.ours.dtype).removeprefix("torch.")
        first = (
            f"vLLM {self.vllm.version}, {dtype}: {counted} tokens of {len(self.adapters)} "
            f"adapters and the base, {len(ties)} of them others, at ties"
        )
        return "\n  ".join(("", first, *ties))


def _says(model: Any, name: str | None, rows: list[Any]) -> Tensor:
    veneer.use(model, name)
    return forced(model, [(prompt, tokens) for prompt, tokens, _ in rows]).double()


def _theirs(rows: list[Any], like: Tensor) -> Tensor:
    """Return vLLM's logarithms where it gave them, and NaN for all other tokens."""
    theirs = torch.full_like(like, float("nan"))
    for row, (_, _, steps) in enumerate(rows):
        for at, likeliest in enumerate(steps):
            theirs[row, at, list(likeliest)] = torch.tensor(list(likeliest.values())).double()
    return theirs


def _rms(difference: Tensor, theirs: Tensor) -> float:
    return float(difference[~theirs.isnan()].square().mean().sqrt())


def both_sides(
    base: Path, adapters: Mapping[str, Path], dtype: str, prompts: list[list[int]], **options: Any
) -> Sides:
    ours, wide = (veneer.load_base(base, dtype=d).model for d in (dtype, "float32"))
    for name, place in adapters.items():
        for model in (ours, wide):
            veneer.load(model, place, name=name)
    wide.to(WIDER[dtype])
    vllm = Vllm(
        base,
        base.with_suffix(".log"),
        dtype=dtype,
        max_loras=len(adapters) + 1,  # without a slot to spare the base is another: see below
        **options,
    )
    for name, place in adapters.items():
        assert check(place, "vllm").loads, name
        assert vllm.load(name, place) is None, name
    return Sides(ours, wide, vllm, adapters, prompts)


def forced(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """Return how likely a model of ours finds each token in the place of each token of the answers
    that follow the prompts, as logarithms: (rows, tokens of an answer, vocabulary)."""
    found = []
    with torch.no_grad():
        for prompt, answer in rows:
            ids = torch.tensor([[*prompt, *answer]])
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            found.append(logits.float().log_softmax(-1))
    return torch.stack(found)
