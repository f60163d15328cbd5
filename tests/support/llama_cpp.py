"""llama.cpp itself, as the package xllamacpp carries it: its server on the loopback interface."""

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


class LlamaCpp:
    """A server over a GGUF model, with LoRA files that act where a request asks for them."""

    def __init__(
        self, model: Path, adapters: Sequence[Path] = (), *, context: int = 256, exact: bool = False
    ) -> None:
        lib = pytest.importorskip("xllamacpp")
        params = lib.CommonParams()
        params.model.path = str(model)
        params.hostnames, params.port = ["127.0.0.1"], 0
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.lora_adapters = [lib.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
        if exact:  # keys and values in 16 bits would be most of what it differs by
            params.cache_type_k = params.cache_type_v = lib.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = lib.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # What it keeps of earlier prompts it would take for later ones of another strength.
        params.cache_ram_mib = 0
        self.adapters = [str(path) for path in adapters]
        self.server = lib.Server(params)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, data, kind)
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)

    def complete(self, prompt: Any, scales: dict[Path, float] | None = None, **body: Any) -> Any:
        """Go on from a text or ids, greedily, with adapters at these scales, all others off."""
        lora = [
            {"id": self.adapters.index(str(path)), "scale": s} for path, s in (scales or {}).items()
        ]
        usual = {"temperature": 0, "cache_prompt": False, "lora": lora}
        return self.ask("/completion", {"prompt": prompt, **usual, **body})

    def next_token(
        self, ids: Tensor, vocab: int, scales: dict[Path, float] | None = None
    ) -> Tensor:
        """Return how likely each token is after each row of ids, as logarithms: (rows, vocab)."""
        rows = []
        for row in ids.tolist():
            reply = self.complete(row, scales, n_predict=1, n_probs=vocab)
            (first,) = reply["completion_probabilities"]
            row = torch.full((vocab,), float("nan"))
            for token in first["top_logprobs"]:
                row[token["id"]] = token["logprob"]
            rows.append(row)
        return torch.stack(rows)
