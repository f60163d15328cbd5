"""Which objective, and its numbers: a frozen, validated value that imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal
from urllib.parse import urlsplit

from veneer.checks import (
    ABOVE_0,
    BETWEEN_0_AND_1,
    BOOLEAN,
    TEXT,
    at_least,
    check_config,
    one_of,
    whole_number,
)
from veneer.data.rows import RowShape

ObjectiveName = Literal[
    "sft", "dpo", "ipo", "simpo", "orpo", "kto", "cpo", "reward", "distill", "grpo", "rloo"
]
Reference = Literal["base", "start"]
Divergence = Literal["forward", "reverse", "jsd"]

# TRL's defaults, but for SimPO, whose authors advise 2 to 2.5, and half of that for its margin.
USUAL_BETA: Mapping[ObjectiveName, float] = {
    "dpo": 0.1,
    "ipo": 0.1,
    "simpo": 2.0,
    "orpo": 0.1,
    "kto": 0.1,
    "cpo": 0.1,
}
SMOOTHED = ("dpo", "cpo")
WITH_REFERENCE = ("dpo", "ipo", "kto")
OF_A_SERVER = 20  # likeliest tokens: vLLM's limit unless --max-logprobs says otherwise, and ours
ON_POLICY = ("grpo", "rloo")  # which learn from the model's own samples
# Preferences are learnt from a model that answers already, and a rate that suits new answers takes
# it apart: the papers' rates are a tenth of those for answers and less.
SHARE_OF_RATE = 0.1


@dataclass(frozen=True)
class Objective:
    """What a run learns by. Raises ConfigError, which lists everything that is wrong."""

    objective: ObjectiveName = "sft"
    """What is learnt by: answers (sft); pairs of a chosen and a rejected answer (dpo, ipo, simpo,
    orpo, cpo), or to tell which is better (reward: a reward model); answers that were judged one by
    one (kto); what a teacher gives the tokens of answers (distill); or the model's own answers to
    prompts, which rewards judge (grpo, rloo)."""
    beta: float | None = None
    """How strongly preferences hold the model to its reference, or weigh beside the answers (orpo);
    0.1 unless given, and 2 for simpo."""
    label_smoothing: float = 0.0
    """The share of pairs whose judgement is taken to be wrong; of dpo and cpo."""
    simpo_margin: float = 1.0
    """By how much the chosen answer's reward is to lead, before beta; of simpo."""
    nll_weight: float = 1.0
    """The weight of the chosen answer's own loss beside the preference; of cpo."""
    desirable_weight: float = 1.0
    """The weight of desirable answers; of kto."""
    undesirable_weight: float = 1.0
    """The weight of undesirable answers; of kto."""
    reward_centre: float = 0.0
    """How strongly the rewards of a pair are held around zero; of reward. 0.01 is usual."""
    reference: Reference = "base"
    """The model that preferences are measured from: the base without any adapter, or the model
    as the run starts (start), such as with the adapter of --from."""
    teacher: str | None = None
    """Directory of another adapter over the same base, whose probabilities are learnt, or the
    address of an OpenAI-compatible server, as http://localhost:8000/v1, with a model that has the
    same vocabulary; with on_policy the adapter, base (the model without any), or the name of
    another model with the same vocabulary; of distill."""
    teacher_model: str | None = None
    """Which of the server's models is the teacher; its only one unless given."""
    on_policy: bool = False
    """Let the rows be prompts, and learn what the teacher gives the student's own answers to them,
    by the settings of samples; of distill."""
    divergence: Divergence | None = None
    """How far the student is from its teacher: by what the teacher may say (forward; the usual one
    of given answers), by what the student says (reverse; that with on_policy), or by how far both
    are from their mixture (jsd); of distill."""
    jsd_beta: float = 0.5
    """The teacher's share in that mixture; of divergence jsd."""
    teacher_top_k: int | None = None
    """How many of the teacher's likeliest tokens count one by one, all others together: 64 unless
    given, and 20 of a server, which most servers give at most; of distill. They are kept on the
    disk: 8 bytes each, for each token that is learnt. With on_policy all count one by one."""
    distill_temperature: float = 1.0
    """By what the logits of teacher and student are divided before they are compared; of
    distill."""

    def __post_init__(self) -> None:
        name = self.objective
        usual = {field.name: field.default for field in fields(self)}
        usual["divergence"] = "reverse" if self.on_policy is True else "forward"
        usual["teacher_top_k"] = OF_A_SERVER if self.teacher_is_served else 64
        for key in ("divergence", "teacher_top_k"):
            if getattr(self, key) is None:
                object.__setattr__(self, key, usual[key])
        also = "base, or another model" if self.on_policy is True else "a server's address"
        only = {
            "label_smoothing": SMOOTHED,
            "simpo_margin": ("simpo",),
            "nll_weight": ("cpo",),
            "desirable_weight": ("kto",),
            "undesirable_weight": ("kto",),
            "reward_centre": ("reward",),
            "reference": WITH_REFERENCE,
            "beta": tuple(USUAL_BETA),
            "teacher": ("distill",),
            "teacher_model": ("distill",),
            "on_policy": ("distill",),
            "jsd_beta": ("distill",),
            "divergence": ("distill",),
            "teacher_top_k": ("distill",),
            "distill_temperature": ("distill",),
        }
        check_config(
            self,
            opening="This objective cannot be",
            rules={
                "objective": one_of(ObjectiveName),
                "beta": ABOVE_0,
                "label_smoothing": at_least(0, below=0.5),  # more turns the preference round
                "simpo_margin": at_least(0),
                "nll_weight": at_least(0),
                "desirable_weight": ABOVE_0,
                "undesirable_weight": ABOVE_0,
                "reward_centre": at_least(0),
                "reference": one_of(Reference),
                "teacher": TEXT,
                "teacher_model": TEXT,
                "on_policy": BOOLEAN,
                "divergence": one_of(Divergence),
                "jsd_beta": BETWEEN_0_AND_1,
                "teacher_top_k": whole_number(1),
                "distill_temperature": ABOVE_0,
            },
            contradictions={
                "distill learns from a teacher; name the directory of another adapter of this base "
                f"by teacher, or {also}": name == "distill" and not self.teacher,
                f"jsd_beta would do nothing with divergence {self.divergence}; it is of jsd": (
                    name == "distill" and self.divergence != "jsd" and self.jsd_beta != 0.5
                ),
                **self._against_a_server(),
                "teacher_top_k would do nothing with on_policy, where all tokens count": (
                    self.on_policy is True and self.teacher_top_k != usual["teacher_top_k"]
                ),
            }
            | {
                f"{key} would do nothing with {name}; it is of {', '.join(names)}": (
                    name not in names and getattr(self, key) != usual[key]
                )
                for key, names in only.items()
            },
        )

    @property
    def teacher_is_served(self) -> bool:
        """Whether the teacher is a server's model."""
        return isinstance(self.teacher, str) and "://" in self.teacher

    def _against_a_server(self) -> dict[str, bool]:
        """Return a message for what does not go with a teacher at an address, and whether it is
        so."""
        if not self.teacher_is_served:
            return {
                "teacher_model would do nothing; it is of a teacher that is a server's address": (
                    self.teacher_model is not None and self.objective == "distill"
                ),
            }
        return {
            f"teacher {why_no_address(str(self.teacher))}": bool(why_no_address(str(self.teacher))),
            "with on_policy the teacher's logits of all tokens are needed, and a server gives its "
            "likeliest alone; name an adapter, base or a model by teacher": self.on_policy is True,
            "distill_temperature is of logits, and a server gives probabilities of its likeliest "
            "tokens alone, at temperature 1; leave it at 1": self.distill_temperature != 1,
        }

    @property
    def course(self) -> dict[str, Any]:
        """The settings on which the course of the weights depends, as checkpoints have them: those
        that are not the usual ones, as earlier versions knew none."""
        usual = type(self)().__dict__
        return {name: value for name, value in asdict(self).items() if value != usual[name]}

    def against(
        self,
        *,
        context_parallel: int,
        replay_passes: bool,
        splits: bool = False,
        deduplicates: bool = False,
        new_words: bool = False,
    ) -> dict[str, bool]:
        """Return a message for each setting of a run that does not go with this objective, and
        whether it is set."""
        others, distills = self.objective != "sft", self.objective == "distill"
        compares = others and (not distills or self.on_policy)
        return {
            f"long_rows split makes several rows of one, and {self.objective} compares whole ones; "
            "take cut, drop or error": compares and splits,
            f"deduplicate compares answers, not what {self.objective} learns from": (
                compares and deduplicates
            ),
            f"new_words would be learnt from preferences; train the words on answers first, and "
            f"start {self.objective} from that model": compares and new_words,
            "new_words are tokens that the teacher does not have": distills and new_words,
            f"{self.objective} reads whole rows, and context_parallel deals their tokens; leave it "
            "at 1": others and context_parallel > 1,
            f"replay_passes records passes of answers alone, not of {self.objective}": (
                others and replay_passes
            ),
        }

    @property
    def strength(self) -> float:
        """Beta: the one that was asked for, or the usual one."""
        return self.beta or USUAL_BETA[self.objective]

    @property
    def shape(self) -> RowShape:
        """What a row of the data is."""
        if self.objective in ON_POLICY or self.on_policy:
            return "prompts"
        return {"sft": "answers", "distill": "answers", "kto": "judged"}.get(
            self.objective, "pairs"
        )  # type: ignore[return-value]

    @property
    def rows_of_an_example(self) -> int:
        """How many rows an example has, which share a pass."""
        return 2 if self.shape in ("pairs", "judged") else 1

    @property
    def is_ranking(self) -> bool:
        """Whether a head of one number is learnt beside the adapter: a reward model."""
        return self.objective == "reward"

    @property
    def has_reference(self) -> bool:
        """Whether the loss measures from a reference model."""
        return self.objective in WITH_REFERENCE

    @property
    def asks(self) -> str | None:
        """What is done before the first step, for a person; None where nothing is."""
        if self.teacher is not None and not self.on_policy:
            return "Asking the teacher about the rows"
        return "Measuring the rows by the reference model" if self.has_reference else None

    @property
    def share_of_rate(self) -> float:
        """The learning rate, as a share of that for answers."""
        return 1.0 if self.objective in ("sft", "orpo", "cpo", "distill") else SHARE_OF_RATE


def why_no_address(address: str) -> str:
    """Return why an address is none that can be asked, nothing where it can be; what may be a
    secret in it is not repeated."""
    try:
        where = urlsplit(address)
        host, _ = where.hostname, where.port  # which raises ValueError
    except ValueError:
        return "is no address, such as http://localhost:8000/v1"
    if where.username or where.password:
        return (
            "has a user or a password in its address, which a run would write down; give a key by "
            "the environment variable OPENAI_API_KEY"
        )
    if where.scheme not in ("http", "https") or not host or where.query or where.fragment:
        return f"{address} is no address of a server, such as http://localhost:8000/v1"
    if any(character <= " " or character > "~" for character in address):
        return "has other characters in its address than ASCII's visible ones"
    return ""


ANSWERS = Objective()  # supervised fine-tuning
