"""How a policy is trained on its own samples: a frozen, validated value that imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from veneer.checks import (
    ABOVE_0,
    BOOLEAN,
    NUMBER,
    TEXT,
    at_least,
    check_config,
    each,
    one_of,
    whole_number,
)
from veneer.rewards.judged import OnFault

LossLevel = Literal["answer", "token", "budget"]
# What of these settings says which samples are drawn, and not how they are judged.
OF_SAMPLES = ("group_size", "prompts_per_step", "max_new_tokens", "updates", "eval_answers")


@dataclass(frozen=True)
class OnPolicy:
    """Training on samples (grpo, rloo, distill with on_policy). Raises ConfigError, which lists
    everything that is wrong.

    The usual values are GRPO's. Dr. GRPO is loss_level "budget" without scale_rewards; DAPO is
    loss_level "token", clip_high 0.28, an overlong_margin and resample.
    """

    reward: tuple[str, ...] = ()
    """What answers are judged by, several if need be: MODULE:FUNCTION or FILE.py:FUNCTION; exact;
    regex:PATTERN; json:SCHEMA.json; grader:GRADER.json; tests; model:ADAPTER, a reward model."""
    reward_weights: tuple[float, ...] | None = None
    """The weight of each reward in their sum; 1 unless given."""
    reward_seconds: tuple[float, ...] | None = None
    """Seconds that each reward may take for an answer, or tests for each of its tests; 10 unless
    given."""
    on_reward_fault: OnFault = "skip"
    """Where a reward raises, hangs or is not finite: the answer counts for nothing (skip), or the
    run stops (stop)."""
    group_size: int = 8
    """Answers to each prompt, which rewards compare with each other."""
    prompts_per_step: int = 8
    """Prompts of a step."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    updates: int = 1
    """Optimizer steps on the samples of a step."""
    eval_answers: int = 1
    """Answers to each prompt of eval_data, whose mean reward, or distance from the teacher, decides
    which weights are best."""
    kl_weight: float = 0.0
    """The weight of the distance from the base without the adapter."""
    clip_low: float = 0.2
    """By how much a token's probability may fall below what it was drawn with and still learn."""
    clip_high: float = 0.2
    """By how much it may rise."""
    loss_level: LossLevel = "answer"
    """What the loss is the mean over: answers, each in the mean over its tokens; tokens; or all
    tokens that answers could have (budget)."""
    scale_rewards: bool = True
    """Divide the advantages of a group by its standard deviation; of grpo."""
    overlong_margin: int = 0
    """Tokens before the longest answer's end from which on the reward falls, by 1 at the end."""
    resample: int = 0
    """How often at most a group whose answers all have one reward, so that nothing is learnt from
    it, is drawn again in its step."""
    importance_cap: float | None = None
    """Weigh each token by how much likelier the trainer makes it than the sampler did, at most
    so many times; not at all unless given."""

    def __post_init__(self) -> None:
        # As a command line, a recipe or a program gives them.
        for name in ("reward", "reward_weights", "reward_seconds"):
            value = getattr(self, name)
            if isinstance(value, str | float | int):
                value = (value,)
            object.__setattr__(self, name, value if value is None else tuple(value))
        check_config(
            self,
            opening="Samples cannot be learnt from so",
            rules={
                "reward": each(TEXT),
                "reward_weights": each(NUMBER),
                "reward_seconds": each(ABOVE_0),
                "on_reward_fault": one_of(OnFault),
                "group_size": whole_number(1),
                "prompts_per_step": whole_number(1),
                "max_new_tokens": whole_number(1),
                "updates": whole_number(1),
                "eval_answers": whole_number(1),
                "kl_weight": at_least(0),
                "clip_low": at_least(0, below=1),
                "clip_high": at_least(0),
                "loss_level": one_of(LossLevel),
                "scale_rewards": BOOLEAN,
                "overlong_margin": whole_number(0),
                "resample": whole_number(0),
                "importance_cap": ABOVE_0,
            },
            contradictions={
                f"{name} has {len(values)} numbers for {len(self.reward)} rewards": (
                    len(values) != len(self.reward)
                )
                for name in ("reward_weights", "reward_seconds")
                if (values := getattr(self, name)) is not None
            }
            | {
                "overlong_margin is more than max_new_tokens": (
                    self.overlong_margin > self.max_new_tokens
                )
            },
        )

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each reward."""
        return self.reward_weights or (1.0,) * len(self.reward)

    @property
    def seconds(self) -> tuple[float, ...]:
        """The time limit of each reward."""
        return self.reward_seconds or (10.0,) * len(self.reward)

    @property
    def course(self) -> dict[str, Any]:
        """The settings that are not the usual ones, as checkpoints have them."""
        usual = type(self)().settings()
        return {name: value for name, value in self.settings().items() if value != usual[name]}

    def settings(self) -> dict[str, Any]:
        """Return every setting as a plain value for YAML and JSON."""
        values = asdict(self).items()
        return {name: list(x) if isinstance(x, tuple) else x for name, x in values}

    def against(self, name: str, *, is_on_policy: bool) -> dict[str, bool]:
        """Return a message for what of these settings does not go with the objective of this name,
        and whether it is so."""
        others, of = ", ".join(self.course), "grpo, rloo and distill with on_policy"
        is_judged = is_on_policy and name != "distill"
        if is_on_policy and not is_judged:
            others, of = ", ".join(n for n in self.course if n not in OF_SAMPLES), "grpo and rloo"
        return {
            f"{others} would do nothing with {name}; it is of {of}": (
                bool(others) and not is_judged
            ),
            f"{name} learns from what rewards say of samples; name one by reward, such as "
            "rewards.py:function, exact or regex:PATTERN": is_judged and not self.reward,
            f"{name} compares the answers to one prompt; take a group_size of 2 or more": (
                is_judged and self.group_size < 2
            ),
            "scale_rewards and loss_level are of grpo; rloo compares whole answers as they are": (
                name == "rloo" and not {"scale_rewards", "loss_level"}.isdisjoint(self.course)
            ),
        }
