"""The server of a soak: a small random base that takes tools, adapters over it, and what the
process holds of the machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from bench.island import rows as island_rows
from veneer.models import minigpt
from veneer.serve.jobs.watching import STOP_SECONDS

KEY = "the-admin-key-of-a-measurement"
SEPARATORS = ["<|im_start|>", "<|im_end|>"]
# Hermes' form: tools in the system's turn, calls as JSON between tags.
CHAT_TEMPLATE = """{% if tools %}<|im_start|>system
Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.tool_calls is defined and m.tool_calls %}{% for call in m.tool_calls %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
NEW_WORDS = ("plimbo", "tharnow")  # of the adapter "tokens"
INVOCATION = "<|im_start|>assistant\n"
# Adapters by name; the two that are called changing-... take turns under one name.
ADAPTERS: dict[str, veneer.LoRA | veneer.Method] = {
    "plain": veneer.LoRA(rank=4, targets="all"),
    "dora": veneer.LoRA(rank=2, targets="attention", dora=True),
    "tokens": veneer.LoRA(rank=2, targets="mlp"),
    "prompt": veneer.Method("prompt", virtual_tokens=7),
    "prefix": veneer.Method("prefix", virtual_tokens=20),
    "activated": veneer.LoRA(rank=2, targets="attention", invocation=INVOCATION),
    "changing-1": veneer.LoRA(rank=2, targets="all"),
    "changing-2": veneer.LoRA(rank=6, targets="mlp"),
}


def write_base(place: Path) -> None:
    """Write a random Llama of two layers, whose tokenizer knows the island's texts."""
    texts = [str(row) for row in island_rows("qa", 200, seed=0)]
    tokenizer = minigpt.wrap_tokenizer(minigpt.train_tokenizer(texts, 700))
    tokenizer.add_special_tokens({"additional_special_tokens": SEPARATORS})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.eos_token = SEPARATORS[1]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    veneer.write_model(LlamaForCausalLM(config).eval(), tokenizer, place)


def write_adapters(base: str, place: Path) -> None:
    """Write ADAPTERS with random values below `place`."""
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        loaded = veneer.load_base(base)
        if name == "tokens":
            veneer.add_tokens(loaded.model, loaded.tokenizer, NEW_WORDS)
        if isinstance(settings, veneer.LoRA) and settings.invocation is not None:
            ids = loaded.tokenizer.encode(INVOCATION, add_special_tokens=False)
            settings = replace(settings, invocation=ids)
        model = veneer.attach(loaded.model, settings)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
        veneer.save(model, place / name, tokenizer=loaded.tokenizer)


@dataclass(frozen=True)
class Held:
    """What a process holds: bytes of memory, descriptors, threads, and sockets among the
    descriptors."""

    memory: int
    descriptors: int
    threads: int
    sockets: int = 0

    @property
    def others(self) -> int:
        """Descriptors that are no sockets, of which clients decide how many are open."""
        return self.descriptors - self.sockets


def held_by(process: int) -> Held:
    """Return what a process holds now, without those that it has started."""
    home = Path("/proc") / str(process)
    resident = int((home / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    descriptors, threads = (list((home / name).iterdir()) for name in ("fd", "task"))
    return Held(resident, len(descriptors), len(threads), sum(map(_is_socket, descriptors)))


def _is_socket(descriptor: Path) -> bool:
    try:
        return str(descriptor.readlink()).startswith("socket:")
    except FileNotFoundError:  # closed meanwhile
        return False


class ServerProcess:
    """`veneer serve` over a base, with adapters that can be loaded and jobs that can be trained."""

    def __init__(self, base: str, place: Path, *flags: str) -> None:
        self.log = place / "server.log"
        (place / "runs").mkdir(exist_ok=True)
        command = [sys.executable, "-m", "veneer", "serve", base, "--port", "0"]
        command += ["--adapters-dir", str(place / "adapters"), "--enable-lora-loading"]
        command += ["--runs", str(place / "runs"), "--enable-training", *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"VENEER_ADMIN_KEY": KEY, "COLUMNS": "200"},
                process_group=0,  # Ctrl-C in a terminal is the affair of whoever watches it
            )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if match := re.search(r"http://[\d.]+:\d+", line):
                self.url = match.group()
                return
        raise RuntimeError(self.log.read_text())

    def held(self) -> Held:
        """Return what the server's own process holds now, without its workers."""
        return held_by(self.process.pid)

    def failures(self) -> int:
        """Return how often the log has a traceback."""
        return self.log.read_text(errors="replace").count("Traceback (most recent call last)")

    def stop(self) -> int:
        """End the server as SIGTERM does, and return how it exited."""
        self.process.terminate()
        return self.process.wait(STOP_SECONDS + 60)  # a training may need the first for its step
