"""Carries out what it reads in an environment that has vLLM and no Veneer.

It reads a JSON object a line, and writes one for each:

    {"engine": {...}}                              start an engine with vLLM's own arguments
    {"load": PATH, "name": NAME, "request": {...}} read an adapter, or say why not in vLLM's words
    {"answer": ROWS, "new": N, "top": K}           go on greedily from all rows, in one call
    {"decode": ROWS, "steps": N}                   time steps in which every row gets a token
    {"experts": PATH, "base": {...}, "out": FILE}  read an adapter's stacks of experts as vLLM's
                                                   models do, and write what each adds to its weight

where ROWS are pairs of an adapter's name, or null for the base, and the prompt's tokens.
"""

import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

# One process: each step is one call, and what is wrong with an adapter is raised here.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"}


class Engine:
    """vLLM's engine, and the adapters that it has read."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(disable_log_stats=True, skip_tokenizer_init=True, **options)
        self.adapters: dict[str, Any] = {}
        self.requests = 0

    def load(self, name: str, path: str, **options: Any) -> dict[str, Any]:
        from vllm.lora.request import LoRARequest

        request = LoRARequest(name, len(self.adapters) + 1, path, **options)
        self.adapters[name] = request
        try:
            self.llm.llm_engine.add_lora(request)
        except Exception as error:  # whatever vLLM raises is its answer
            return {"refused": f"{type(error).__name__}: {error}"}
        return {"refused": None}

    def answer(self, rows: list[list[Any]], *, new: int, top: int) -> dict[str, Any]:
        """Return each row's tokens, and after each the likeliest ones with their logarithms."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": tokens} for _, tokens in rows],
            [self.sampling(new, top)] * len(rows),
            lora_request=[self.adapters.get(name) for name, _ in rows],
            use_tqdm=False,
        )
        answers = [output.outputs[0] for output in outputs]
        return {
            "answers": [
                {
                    "tokens": list(answer.token_ids),
                    "logprobs": [
                        [[token, value.logprob] for token, value in step.items()]
                        for step in answer.logprobs
                    ],
                }
                for answer in answers
            ]
        }

    def decode(self, rows: list[list[Any]], *, steps: int) -> dict[str, Any]:
        """Time steps in which every row gets one token, after all prompts have been read."""
        engine, tokens = self.llm.llm_engine, [[] for _ in rows]
        names = {}
        for n, (name, prompt) in enumerate(rows):
            self.requests += 1
            names[f"row-{self.requests}-"] = n
            engine.add_request(
                f"row-{self.requests}-",
                {"prompt_token_ids": prompt},
                self.sampling(steps + 2, None),
                lora_request=self.adapters.get(name),
            )

        def step() -> None:
            for output in engine.step():
                row = next(n for key, n in names.items() if output.request_id.startswith(key))
                tokens[row] = list(output.outputs[0].token_ids)

        while not all(tokens):
            step()
        start, before = time.perf_counter(), sum(map(len, tokens))
        for _ in range(steps):
            step()
        spent = time.perf_counter() - start
        made = sum(map(len, tokens)) - before
        while engine.has_unfinished_requests():
            step()
        return {"ms": spent * 1e3 / (made / len(rows)), "tokens": tokens}

    def sampling(self, new: int, top: int | None) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0.0, max_tokens=new, ignore_eos=True, logprobs=top, detokenize=False
        )


def experts(path: str, *, base: dict[str, Any], out: str) -> dict[str, Any]:
    """Let vLLM's reader take an adapter's stacks apart, without the kernels that would apply them:
    those are for accelerators. base: the class of its model, the number of experts, and whether it
    keeps all of a block's experts as one weight."""
    import torch
    from safetensors.torch import save_file
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.peft_helper import PEFTHelper

    lora = LoRAModel.from_local_checkpoint(
        path,
        {"experts", "q_proj", "k_proj", "v_proj", "o_proj"},
        PEFTHelper.from_local_dir(path, None),
        lora_model_id=1,
        device="cpu",
        dtype=torch.float32,
    )
    count = base["experts"]
    layer = SimpleNamespace(
        local_num_experts=count,
        global_num_experts=count,
        ep_rank=0,
        w13_lora_a_stacked=[torch.empty(1, count)],
    )
    manager = SimpleNamespace(
        _get_lora_layer_weights=lambda model, name: model.get_lora(name),
        _is_3d_moe_model=base["as_one"],
        model=SimpleNamespace(config=SimpleNamespace(architectures=[base["architecture"]])),
    )
    take_apart = (
        LoRAModelManager._stack_moe_lora_weights
        if base["as_one"]
        else LoRAModelManager._convert_3d_to_2d_moe_lora
    )
    for weights in lora.loras.values():
        weights.optimize()  # its factor goes into B
    deltas = {}
    for name in [name for name in lora.loras if name.endswith(".experts")]:
        take_apart(manager, lora, layer, name)
        weights = lora.loras[name]
        names = ("gate_up", "down") if base["as_one"] else ("gate", "down", "up")
        for which, A, B in zip(names, weights.lora_a, weights.lora_b, strict=True):
            deltas[f"{name}.{which}"] = (B @ A).contiguous()  # (experts, out, in)
    save_file(deltas, out)
    return {"modules": sorted(deltas)}


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's own lines go where errors go
    engine = None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if "engine" in job:
                import vllm

                engine = Engine(job["engine"])
                done: dict[str, Any] = {"version": vllm.__version__}
            elif "load" in job:
                done = engine.load(job["name"], job["load"], **job["request"])
            elif "answer" in job:
                done = engine.answer(job["answer"], new=job["new"], top=job["top"])
            elif "experts" in job:
                done = experts(job["experts"], base=job["base"], out=job["out"])
            else:
                done = engine.decode(job["decode"], steps=job["steps"])
        except Exception as error:
            import traceback

            traceback.print_exc()
            done = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(done) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
