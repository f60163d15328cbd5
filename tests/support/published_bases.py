"""Tiny bases in published formats, written as their publishers write them, beside the dense models
that the formats' own programs make of them."""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from support import published_weights
from support.random_adapters import tokenizer
from support.tiny_models import CONFIGS, OTHER_DECODERS, with_large_weights
from veneer.formats.merged import write_model

FORMATS = {case.name: case for case in (*published_weights.SMALL, published_weights.MXFP4)}
Writer = Callable[[int, int], tuple[dict[str, Tensor], Tensor]]
GROWN = 8.0  # what the random scales are multiplied by, so that differences show


@cache
def published(architecture: str, name: str) -> tuple[Path, Any]:
    """Return the directory of a tiny base in a format of published_weights, and its dense twin."""
    case, draw = FORMATS[name], torch.Generator().manual_seed(3)
    config = copy.deepcopy((CONFIGS | OTHER_DECODERS)[architecture])
    if name == "mxfp4":
        config.intermediate_size = 64  # whole blocks
    elif hasattr(config, "moe_intermediate_size"):
        config.moe_intermediate_size = 32
    torch.manual_seed(0)
    model = with_large_weights(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    place = Path(mkdtemp()) / name
    write_model(model, tokenizer(), place)
    stored = load_file(place / "model.safetensors")

    def write(out: int, in_: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return the tensors of a weight (out, in), and its numbers."""
        tensors = case.write(out, in_, draw)
        scales = next(key for key in tensors if "scale" in key)
        if tensors[scales].dtype != torch.uint8:
            tensors[scales] = (tensors[scales].float() * GROWN).to(tensors[scales].dtype)
        return tensors, case.exact(tensors, torch.float32)

    for path, module in list(model.named_modules()):
        if path.endswith(".experts"):
            stored = {
                key: t
                for key, t in stored.items()
                if not key.startswith(f"{path}.") or key.endswith("bias")
            }
            if name == "mxfp4":
                _write_blocks(stored, path, module, write)
            else:
                _write_each_expert(stored, path, module, write)
        is_linear = isinstance(module, torch.nn.Linear | Conv1D)
        if name == "mxfp4" or not is_linear or module is model.get_output_embeddings():
            continue
        shape, transposed = tuple(module.weight.shape), isinstance(module, Conv1D)
        tensors, exact = write(*(shape[::-1] if transposed else shape))
        module.weight.data.copy_(exact.T if transposed else exact)
        del stored[f"{path}.weight"]
        stored |= {f"{path}.{key}": tensor for key, tensor in tensors.items()}
    save_file(stored, place / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((place / "config.json").read_text())
    settings["quantization_config"] = case.config
    (place / "config.json").write_text(json.dumps(settings))
    return place, model


def _write_blocks(stored: dict[str, Tensor], path: str, module: Any, write: Writer) -> None:
    """Write stacks as gpt-oss has them: blocks and scales of all experts, (experts, out, ...)."""
    for leaf in ("gate_up_proj", "down_proj"):
        stack = module._parameters[leaf]  # (experts, in, out)
        experts = [write(*expert.T.shape) for expert in stack]
        for key in ("blocks", "scales"):
            stored[f"{path}.{leaf}_{key}"] = torch.stack([tensors[key] for tensors, _ in experts])
        stack.data.copy_(torch.stack([exact.T for _, exact in experts]))


def _write_each_expert(stored: dict[str, Tensor], path: str, module: Any, write: Writer) -> None:
    """Write each expert's gate, up and down as linear layers of their own."""
    for e in range(len(module.down_proj)):
        gate, up = module.gate_up_proj.data[e].chunk(2)
        for leaf, weight in (("gate", gate), ("up", up), ("down", module.down_proj.data[e])):
            tensors, exact = write(*weight.shape)
            weight.copy_(exact)
            stored |= {f"{path}.{e}.{leaf}_proj.{key}": t for key, t in tensors.items()}
