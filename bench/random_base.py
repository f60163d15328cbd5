"""A base in NF4 of any shape with random weights, written straight to disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from veneer.files import write_tensors
from veneer.models.quantize import quantizable, quantizable_embedding
from veneer.models.source import INDEX
from veneer.models.stored_names import stored_names
from veneer.quant.int8 import Int8
from veneer.quant.nf4 import BLOCK, BLOCK_OF_SCALES, NF4

WHOLE = BLOCK * BLOCK_OF_SCALES  # numbers in a block of scales
NORMAL_MAXIMUM = 2.4  # about the largest of 64 normal numbers
MAGNITUDE = 0.02  # the largest number of a block: such that a layer's output stays about its input


def write_random_base(
    directory: Path,
    config: PretrainedConfig,
    *,
    pack_ends: bool = False,
    embedding_scale: float = 1.0,
) -> int:
    """Write a base with random NF4 codes and scales, a file a block, and return its bytes.

    Experts of a mixture are quantized one by one, as `veneer quantize` stores them. pack_ends:
    whether the head is quantized too, and the embedding in 8 bits. embedding_scale: by how much
    the embedding is larger: with a large one tokens stay apart through all blocks.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    layers = quantizable(skeleton, head=pack_ends)
    embedding = quantizable_embedding(skeleton) if pack_ends else None
    conventions = stored_names(skeleton)
    noise = _Noise()
    directory.mkdir(parents=True)
    files: dict[str, dict[str, Tensor]] = {}
    index: dict[str, str] = {}
    written = 0
    for name, weight in [*skeleton.state_dict().items(), ("", torch.empty(0))]:
        names = name.split(".")
        block = next((number for number in names if number.isdigit()), names[-2] if name else "")
        if files and block not in files:  # the last block is complete
            ((last, tensors),) = files.items()
            file = directory / f"model-{last.zfill(5)}.safetensors"
            write_tensors(file, tensors)
            index |= dict.fromkeys(tensors, file.name)
            written += file.stat().st_size
            files = {}
        if not name:
            break
        path = name.removesuffix(".weight")
        tensors = files.setdefault(block, {})
        if name in conventions.counts:
            _, *shape = weight.shape
            like = torch.empty(shape, device="meta")
            for pieces in conventions.pieces(name):
                for piece in pieces:
                    tensors |= {
                        f"{piece.name.removesuffix('.weight')}.{n}": t
                        for n, t in noise.nf4(like[piece.rows].shape).items()
                    }
        elif name == embedding:
            rows = noise.dense(weight.shape) * embedding_scale
            int8 = Int8.quantize(rows, torch.bfloat16)
            tensors |= {f"{path}.{n}": t for n, t in int8.tensors().items()}
        elif path in layers and name != path:
            tensors |= {f"{path}.{n}": t for n, t in noise.nf4(weight.shape).items()}
        elif weight.ndim == 1:
            tensors[name] = torch.ones(weight.shape, dtype=torch.bfloat16)
        else:
            tensors[name] = noise.dense(weight.shape)
    (directory / INDEX).write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    how |= {"llm_int8_skip_modules": []} if pack_ends else {}
    settings = config.to_dict() | {"quantization_config": how}
    (directory / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return written


class _Noise:
    """Normal numbers, drawn and quantized once, of which each weight takes a stretch that begins
    elsewhere."""

    def __init__(self, size: int = 2**26) -> None:
        self.draw = np.random.default_rng(0)
        torch.manual_seed(0)
        numbers = torch.randn(size // WHOLE, WHOLE) * (MAGNITUDE / NORMAL_MAXIMUM)
        self.pattern = NF4.quantize(numbers, torch.bfloat16)
        self.bytes = torch.from_numpy(self.draw.integers(0, 256, size, dtype=np.uint8))

    def _stretch(self, numbers: Tensor, first: int, count: int) -> Tensor:
        stretch = numbers[first:]
        if count > len(stretch):
            stretch = torch.cat([stretch, numbers.repeat(-(count // -len(numbers)))])
        return stretch[:count].clone()  # files hold no shared memory

    def nf4(self, shape: torch.Size) -> dict[str, Tensor]:
        import bitsandbytes.functional as bnb

        numbers = shape.numel()
        blocks = -(numbers // -BLOCK)
        like = self.pattern.state
        first = int(self.draw.integers(0, len(like.state2.absmax)))
        scales = -(blocks // -BLOCK_OF_SCALES)
        state = bnb.QuantState(
            absmax=self._stretch(like.absmax, first * BLOCK_OF_SCALES, blocks),
            shape=shape,
            code=like.code,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=torch.bfloat16,
            offset=like.offset,
            state2=bnb.QuantState(
                absmax=self._stretch(like.state2.absmax, first, scales),
                blocksize=BLOCK_OF_SCALES,
                code=like.state2.code.clone(),
                dtype=torch.float32,
            ),
        )
        codes = self._stretch(self.pattern.codes.view(-1), first * WHOLE // 2, numbers // 2)
        return NF4(codes.view(-1, 1), state, torch.bfloat16).tensors()

    def dense(self, shape: torch.Size) -> Tensor:
        first = int(self.draw.integers(0, 2**20))
        values = self._stretch(self.bytes, first, shape.numel()).to(torch.int8).to(torch.bfloat16)
        return (values * (MAGNITUDE / 128)).view(shape)
