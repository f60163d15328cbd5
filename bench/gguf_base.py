"""What does training over a GGUF file's own blocks take, beside dense numbers and NF4?

    python -m bench.gguf_base [--steps 4] [--tokens 2048] [--bits none,16,4]

The file has Llama-3.2-1B's shape with random weights: Q4_K, its embedding in Q6_K. Each run is a
process of its own. Peak: the most that was resident, pages of the file included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
import torch

DIM, INNER, LAYERS, HEADS, KEY_HEADS, VOCAB = 2048, 8192, 16, 32, 8, 128_256
KEYS = KEY_HEADS * DIM // HEADS
SHAPES = {
    "attn_q": (DIM, DIM),
    "attn_k": (KEYS, DIM),
    "attn_v": (KEYS, DIM),
    "attn_output": (DIM, DIM),
    "ffn_gate": (INNER, DIM),
    "ffn_up": (INNER, DIM),
    "ffn_down": (DIM, INNER),
}
Kind = gguf.GGMLQuantizationType


def random_blocks(draw: np.random.Generator, shape: tuple[int, int], kind: Kind) -> np.ndarray:
    """Return rows of blocks whose numbers are spread about zero by about 0.02."""
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = draw.integers(0, 256, (shape[0], shape[1] // numbers, size), dtype=np.uint8)

    def write_half(at: int, value: float) -> None:
        blocks[..., at : at + 2] = np.array([value], np.float16).view(np.uint8)

    if kind is Kind.Q4_K:  # d, the minima's d, and scales and minima that are all 32
        write_half(0, 0.02 / (32 * 4.6))
        write_half(2, 7.5 * 0.02 / (32 * 4.6))
        blocks[..., 4:12], blocks[..., 12:16] = 32 | 2 << 6, 0
    else:
        blocks[..., 192:208] = 32
        write_half(208, 0.02 / (32 * 18.5))
    return blocks.reshape(shape[0], -1)


def write(path: Path) -> None:
    writer, draw = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(2048)
    writer.add_embedding_length(DIM)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(DIM // HEADS)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    embedding = random_blocks(draw, (VOCAB, DIM), Kind.Q6_K)
    writer.add_tensor("token_embd.weight", embedding, raw_dtype=Kind.Q6_K)
    ones = np.ones(DIM, np.float32)
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", ones)
        for name, shape in SHAPES.items():
            blocks = random_blocks(draw, shape, Kind.Q4_K)
            writer.add_tensor(f"blk.{layer}.{name}.weight", blocks, raw_dtype=Kind.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(path: Path, bits: str, steps: int, tokens: int) -> dict[str, float]:
    """Train for some steps, and return seconds a step, peak and anonymous bytes."""
    import veneer
    from veneer.data.encode import Example
    from veneer.models.load import load_config_and_tokenizer
    from veneer.training.events import Step
    from veneer.training.loop import train
    from veneer.training.memory import begin_measuring, process_memory

    begin_measuring()
    start = time.perf_counter()
    _, tokenizer = load_config_and_tokenizer("smollm2-135m")
    asked = None if bits == "none" else int(bits)
    base = veneer.load_base(path, dtype="bf16", bits=asked, tokenizer=tokenizer)  # type: ignore[arg-type]
    veneer.attach(base.model, veneer.LoRA(rank=8, targets="all"))
    loaded = time.perf_counter() - start
    torch.manual_seed(0)
    rows = torch.randint(3, VOCAB, (steps * tokens // 256, 256)).tolist()
    examples = [Example(row, row, str(i), 0) for i, row in enumerate(rows)]
    config = veneer.TrainConfig(steps=steps, tokens_per_step=tokens, lr=1e-4)
    times, losses, before = [], [], time.perf_counter()
    for event in train(base.model, examples, config):
        if isinstance(event, Step):
            times.append(time.perf_counter() - before)
            losses.append(event.loss)
            before = time.perf_counter()
    return {
        "loaded": loaded,
        "step": min(times),
        "loss": losses[-1],
        "peak": process_memory("VmHWM"),
        "anonymous": process_memory("RssAnon"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--bits", default="none,16,4")
    parser.add_argument("--file", type=Path, help="where the file is, or is to be kept")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(run(asked.file, asked.bits, asked.steps, asked.tokens)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = asked.file or Path(scratch) / "llama-1b.gguf"
        if not file.exists():
            write(file)
        size = file.stat().st_size
        print(f"The file: {size / 1e9:.2f} GB. {asked.tokens} tokens a step, bfloat16, rank 8\n")
        print("| bits | loads in | s/step | peak | above the file | anonymous at the end | loss |")
        print("|---|---|---|---|---|---|---|")
        for bits in asked.bits.split(","):
            command = [sys.executable, "-m", "bench.gguf_base", "--one", "--file", str(file)]
            command += ["--bits", bits, "--steps", str(asked.steps), "--tokens", str(asked.tokens)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            got = json.loads(out.splitlines()[-1])
            peak, anonymous = got["peak"] / 1e9, got["anonymous"] / 1e9
            print(
                f"| {bits} | {got['loaded']:.1f} s | {got['step']:.2f} | {peak:.2f} GB | "
                f"{peak - size / 1e9:.2f} GB | {anonymous:.2f} GB | {got['loss']:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
