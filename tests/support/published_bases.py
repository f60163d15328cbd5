"""Tiny bases in published formats, written as their publishers write them, beside the dense models
that the formats' own programs make of them."""

import copy
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from support import published_weights
from support.random_adapters import tokenizer
from support.tiny_models import CONFIGS, OTHER_DECODERS, with_large_weights
from veneer.formats.merged import write_model

FORMATS = {case.name: case for case in (*published_weights.SMALL, published_weights.MXFP4)}
GROWN = 8.0  # what the random scales are multiplied by, so that differences show


@cache
def published(architecture: str, name: str) -> tuple[Path, Any]:
    """Return the directory of a tiny base in a format of published_weights, and its dense twin."""
    case, draw = FORMATS[name], torch.Generator().manual_seed(3)
    config = copy.deepcopy((CONFIGS | OTHER_DECODERS)[architecture])
    if name == "mxfp4":
        config.intermediate_size = 64  # whole blocks
    torch.manual_seed(0)
    model = with_large_weights(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    place = Path(mkdtemp()) / name
    write_model(model, tokenizer(), place)
    stored = load_file(place / "model.safetensors")
    for path, module in list(model.named_modules()):
        if name == "mxfp4" and path.endswith(".experts"):
            for leaf in ("gate_up_proj", "down_proj"):
                weight = module._parameters[leaf]
                experts = [case.write(*each.T.shape, draw) for each in weight]
                del stored[f"{path}.{leaf}"]
                for key in ("blocks", "scales"):
                    stored[f"{path}.{leaf}_{key}"] = torch.stack([e[key] for e in experts])
                exact = [case.exact(e, torch.float32).T for e in experts]
                weight.data.copy_(torch.stack(exact))
        is_linear = isinstance(module, torch.nn.Linear | Conv1D)
        if name == "mxfp4" or not is_linear or module is model.get_output_embeddings():
            continue
        shape = tuple(module.weight.shape)
        transposed = isinstance(module, Conv1D)
        tensors = case.write(*(shape[::-1] if transposed else shape), draw)
        scales = next(key for key in tensors if "scale" in key)
        tensors[scales] = (tensors[scales].float() * GROWN).to(tensors[scales].dtype)
        exact = case.exact(tensors, torch.float32)
        module.weight.data.copy_(exact.T if transposed else exact)
        del stored[f"{path}.weight"]
        stored |= {f"{path}.{key}": tensor for key, tensor in tensors.items()}
    save_file(stored, place / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((place / "config.json").read_text())
    settings["quantization_config"] = case.config
    (place / "config.json").write_text(json.dumps(settings))
    return place, model
