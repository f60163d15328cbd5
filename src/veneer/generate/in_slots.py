"""Answers on a device that is not to wait: rows in slots, steps as CUDA graphs, tokens read late.

transformers' own loop asks the device twice for each token, whether a row is padded and whether all
rows have ended. Here a step is asked for before the tokens of the one before have come.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from veneer.adapter.invocation import invoked
from veneer.adapter.virtual_context import virtual_count
from veneer.generate.draws import Draw, next_tokens
from veneer.generate.sampling import Sampling
from veneer.generate.slots import NotInSlots, SlotModel
from veneer.kernels.graphs import NONE_HERE, Graphs, Tensors, length_for
from veneer.kernels.transfer import OnTheWay, sent
from veneer.models.context import own_context

log = logging.getLogger("veneer.generate")

CHUNK = 512  # tokens of a prompt that are computed at once
LONGEST_CONTEXT = 2**17  # of models that name none
# Settings of a model's generation_config that change nothing here.
HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"),
    *("temperature", "top_k", "top_p", "do_sample", "max_length", "max_new_tokens", "use_cache"),
    *("cache_implementation", "return_dict_in_generate", "output_attentions", "use_return_dict"),
    *("output_hidden_states", "output_scores"),
}


class InSlots:
    """A model with slots for `rows` answers at a time. Raises NotInSlots where it suits none."""

    def __init__(self, model: PreTrainedModel, rows: int, graphs: Graphs | None = None) -> None:
        if virtual_count(model):
            raise NotInSlots("virtual tokens act")
        if invoked(model):
            raise NotInSlots("an adapter acts from an invocation on")
        config = getattr(model, "generation_config", None)
        settings: dict[str, Any] = {} if config is None else config.to_diff_dict()
        if others := sorted(key for key in settings if key not in HARMLESS and settings[key]):
            raise NotInSlots(f"its generation_config has {', '.join(others)}")
        context = own_context(model.config.get_text_config()) or LONGEST_CONTEXT
        self.model = SlotModel(model, rows, context)
        self.graphs = Graphs.on(model.device) if graphs is None else graphs
        self._newest = torch.zeros(rows, dtype=torch.long, device=model.device)

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        ends: Collection[int],
        streamer: BaseStreamer | None = None,
    ) -> list[list[int]]:
        """Return the new tokens of each row, with the one that ended it. A streamer is given them
        as transformers' `generate` would, but for its end."""
        answers: list[list[int]] = [[] for _ in prompts]
        if streamer is not None:
            streamer.put(torch.zeros(len(prompts), dtype=torch.long))  # in the prompts' place
        for tokens in self.tokens(prompts, sampling, ends=ends):
            if streamer is not None:
                streamer.put(torch.tensor(tokens))
            for answer, token in zip(answers, tokens, strict=True):
                if not answer or answer[-1] not in ends:
                    answer.append(token)
        return answers

    def tokens(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, ends: Collection[int]
    ) -> Iterator[list[int]]:
        """Yield the next tokens of all rows, again and again, until each row has had one of `ends`
        or its most. What comes behind a row's end means nothing. prompts: as many as fit in slots.
        """
        going = set(range(len(prompts)))
        coming: OnTheWay | None = None
        for tokens in self._steps(prompts, sampling):
            coming, before = OnTheWay(tokens), coming
            if before is None:
                continue
            yield (read := before.arrived()[0].tolist())
            going = {row for row in going if read[row] not in ends}
            if not going:
                return
        if coming is not None:
            yield coming.arrived()[0].tolist()

    @torch.no_grad()
    def _steps(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Tensor]:
        """Yield the tokens of each step, (rows,), on the device."""
        model, rows = self.model, len(prompts)
        draws = [Draw(sampling)] * rows
        logits = torch.cat([self._prompt(slot, prompt) for slot, prompt in enumerate(prompts)])
        newest = self._newest[:rows]  # in one place, for the graphs
        newest.copy_(next_tokens(logits, draws))
        for step in range(sampling.max_new_tokens):
            yield newest.clone()
            if step + 1 == sampling.max_new_tokens:
                return
            positions = [len(prompt) + step for prompt in prompts]
            most = max(positions) + 1
            model.reserve(most)
            seen = length_for(most, model.places)

            def decode(inputs: Tensors, seen: int = seen) -> Tensors:
                return {"logits": model.decode(newest, inputs["where"], seen)}

            where = sent([positions, positions, [-1] * rows], model.device)
            key = (rows, seen, model.places)  # the cache has moved where it has other places
            logits = self.graphs(key, decode, {"where": where})["logits"]
            if self.graphs.why_not != NONE_HERE and (notice := self.graphs.notice()):
                log.warning(notice)
            newest.copy_(next_tokens(logits, draws))

    def _prompt(self, slot: int, prompt: Sequence[int]) -> Tensor:
        """Compute a prompt, and return the logits (1, vocab) of its last token."""
        for start in range(0, len(prompt), CHUNK):
            tokens = prompt[start : start + CHUNK]
            is_last = start + CHUNK >= len(prompt)
            logits = self.model.prefill(slot, tokens, start, keep=int(is_last))
        return logits


def in_slots(model: PreTrainedModel, rows: int) -> InSlots | None:
    """Return a model with slots, or None where transformers' own loop answers: on a CPU, where
    nothing waits, and for what suits no slots."""
    if model.device.type == "cpu":
        return None
    try:
        return InSlots(model, rows)
    except NotInSlots as why:
        log.warning("Answers take transformers' own loop, which waits for each token: %s.", why)
        return None
