"""A plan: what would train, and the memory that it takes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from veneer.adapter.report import TargetLine
from veneer.errors import ConfigError
from veneer.models.description import ModelDescription
from veneer.plan.config import ADAPTING, MethodName, PlanConfig
from veneer.plan.memory import CARD_RUNTIME, RUNTIME, MemoryPlan, plan_memory
from veneer.plan.methods import Trained, trained_by
from veneer.plan.reads import Reads, reads
from veneer.plan.sizes import Sizes


@dataclass(frozen=True)
class Plan:
    """Settings, and what follows from them for a model. `adapted`: the layers that would get
    adapters, also for plans of other methods. `drawn`: tokens whose keys and values are held while
    answers are drawn. `teacher`: bytes of one that is there meanwhile."""

    config: PlanConfig
    sizes: Sizes
    adapted: tuple[TargetLine, ...]
    trained: Trained
    memory: MemoryPlan
    runtime: int
    on_card: bool = False
    drawn: int = 0
    teacher: int = 0

    @property
    def model(self) -> ModelDescription:
        return self.sizes.description

    @property
    def notice(self) -> str | None:
        """What this plan does not count, if anything."""
        if not self.sizes.has_uncounted_states:
            return None
        return (
            "What this model's state-space layers keep of their states is not counted: the peak is "
            "higher."
        )

    @cached_property
    def reads(self) -> Reads | None:
        """The weights that a pass reads of a mixture, None for any other model."""
        return reads(self.config, self.sizes, self.trained)

    @property
    def share(self) -> float:
        """Trained parameters over the base's."""
        return self.trained.count / self.model.parameters


def make_plan(
    config: PlanConfig,
    sizes: Sizes,
    adapted: tuple[TargetLine, ...] = (),
    *,
    runtime: int | None = None,
    on_card: bool = False,
    drawn: int = 0,
    teacher: int = 0,
) -> Plan:
    """Return the plan of training a model as `config` says, on the processor or on a card.

    runtime: bytes that are taken besides, the usual ones unless given. drawn, teacher: as the
    plan's.
    Raises ConfigError for a method that does not suit the model.
    """
    trained = trained_by(config, sizes, adapted)
    if runtime is None:
        runtime = CARD_RUNTIME if on_card else RUNTIME
    memory = plan_memory(
        *(config, sizes, trained),
        runtime=runtime,
        on_card=on_card,
        drawn=drawn,
        teacher=teacher,
    )
    return Plan(config, sizes, adapted, trained, memory, runtime, on_card, drawn, teacher)


def replanned(plan: Plan, config: PlanConfig) -> Plan:
    """Return the plan for the same model with other settings."""
    return make_plan(
        *(config, plan.sizes, plan.adapted),
        runtime=plan.runtime,
        on_card=plan.on_card,
        drawn=plan.drawn,
        teacher=plan.teacher,
    )


def comparison(plan: Plan) -> list[tuple[str, Plan]]:
    """Return a titled plan for each method: the plan itself, and others with its settings over a
    dense base (qlora: in 4 bits).

    The first is full training as textbooks count it: 16-bit weights and gradients, Adam's numbers
    in float32. The second is Veneer's, with float32 masters of the weights too. Methods that do not
    suit the model are left out (`unsuited`), and those with adapters unless the plan names layers.
    """
    settings, plain = plan.config, _plain(plan)
    blocks = plain.trained_blocks
    full = plan if settings.method == "full" else replanned(plan, replace(plain, method="full"))
    textbook = replace(
        full,
        memory=plan_memory(
            full.config,
            full.sizes,
            full.trained,
            runtime=full.runtime,
            masters=False,
            on_card=full.on_card,
        ),
    )
    titled = [("full, textbook", textbook), ("full", full)]
    others: tuple[MethodName, ...] = ("freeze", "lora", "dora", "qlora", "prefix", "prompt")
    for method in others:
        title = f"freeze, last {blocks}" if method == "freeze" else method
        if method == settings.method:
            titled.append((title, plan))
        elif plan.adapted or method not in ADAPTING:
            with suppress(ConfigError):  # a method that does not suit this model
                titled.append((title, replanned(plan, replace(plain, method=method))))
    return titled


def unsuited(plan: Plan) -> list[str]:
    """Return why each method that does not suit the plan's model does not."""
    reasons = []
    methods: tuple[MethodName, ...] = ("freeze", "prefix", "prompt")
    if plan.adapted:
        methods = ("dora", *methods)
    for method in methods:
        try:
            trained_by(replace(_plain(plan), method=method), plan.sizes, plan.adapted)
        except ConfigError as error:
            reasons.append(str(error))
    return reasons


def _plain(plan: Plan) -> PlanConfig:
    """Return the plan's settings over a dense base, with no more trained blocks than there are."""
    blocks = max(1, min(plan.config.trained_blocks, plan.model.depth))
    return replace(plan.config, bits=None, pack_head=False, mapped=False, trained_blocks=blocks)
