"""A reward model as a judge of answers: an adapter with a head, over the base that it names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from veneer.data.encode import Encoder
from veneer.data.messages import Message
from veneer.data.packing import pack
from veneer.data.problems import Located, Place
from veneer.data.rows import Conversation
from veneer.errors import ConfigError, ModelError, VeneerError
from veneer.formats import adapters
from veneer.formats.adapters import load
from veneer.formats.locate import Located as LocatedAdapter
from veneer.formats.locate import locate
from veneer.formats.training import base_in
from veneer.fused.forward import Forward, choose_forward
from veneer.models.context import own_context
from veneer.models.evaluating import evaluating
from veneer.models.load import Base, load_base, load_config
from veneer.models.score import SCORE_WEIGHT
from veneer.objectives.ranking import OWN_VALUE, asked_at_its_end
from veneer.quant.settings import quantization_of
from veneer.rewards.judged import Answered, RewardFault
from veneer.training.ranking import with_score

LONGEST = 4096  # tokens of a prompt with its answer, where the model's own context is longer


@dataclass(eq=False)
class ModelReward:
    """The number that a reward model gives a prompt with its answer. Its base is loaded when the
    first answer is judged, in the bits that the head was trained over. Raises ConfigError for what
    is no reward model, or names no base that is here."""

    path: str
    device: str = "auto"
    _adapter: LocatedAdapter = field(init=False, repr=False)
    _loaded: tuple[Base, Encoder, Forward | None] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """What it is called among rewards."""
        return f"model:{self.path}"

    def __post_init__(self) -> None:
        try:
            self._adapter = locate(Path(self.path))
            state = adapters.read(self._adapter.path, shapes_only=True)
        except VeneerError as error:
            raise ConfigError(f"{self.name} cannot judge: {error}") from error
        if SCORE_WEIGHT not in state.modules_to_save:
            raise ConfigError(
                f"{self.path} is no reward model: it has no head. Train one by tune --objective "
                "reward."
            )
        try:
            if not self._adapter.base:
                raise ModelError("its files name none.")
            load_config(self._adapter.base)
        except VeneerError as error:
            raise ConfigError(f"{self.name} cannot judge without its base: {error}") from error

    def __call__(self, answer: Answered) -> float:
        base, encoder, forward = self._loaded or self._load()
        messages = [Message(turn["role"], turn["content"]) for turn in answer.messages]
        messages.append(Message("assistant", answer.text))
        try:
            encoded = encoder.encode(Located(Conversation(tuple(messages)), Place("an answer", 1)))
        except VeneerError as error:
            raise RewardFault("raised", str(error)) from error
        row = asked_at_its_end(encoded)
        if forward is None:
            forward = with_score(choose_forward(base.model, [row])[0])
            self._loaded = (base, encoder, forward)
        with torch.no_grad(), evaluating(base.model):
            return float(forward.losses(base.model, pack([row], [0]), OWN_VALUE)[0])

    def close(self) -> None:
        """Let the model go."""
        self._loaded = None

    def _load(self) -> tuple[Base, Encoder, Forward | None]:
        name, over = self._adapter.base, base_in(self._adapter.training)
        if over is None or quantization_of(load_config(name).to_dict()) is not None:
            base = load_base(name, device=self.device)
        else:
            base = load_base(name, device=self.device, bits=over.bits, pack_head=over.head)
        load(base.model, self._adapter.path, tokenizer=base.tokenizer)
        context = min(own_context(base.model.config.get_text_config()) or LONGEST, LONGEST)
        encoder = Encoder(base.tokenizer, max_length=context - 1, long_rows="cut")
        self._loaded = (base, encoder, None)
        return self._loaded
