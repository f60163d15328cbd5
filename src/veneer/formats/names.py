"""The names of formats and runtimes. Imports nothing, so that the command line may import it."""

from __future__ import annotations

from typing import Literal

FormatName = Literal["native", "peft", "gguf", "mlx", "loralib"]
RuntimeName = Literal["vllm", "sglang", "tgi", "ollama", "llama.cpp", "peft", "mlx"]
