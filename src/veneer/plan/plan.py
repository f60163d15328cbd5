"""A plan: what would train of a model, and the memory that it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from veneer.plan.config import ADAPTING, MethodName, PlanConfig
from veneer.plan.memory import RUNTIME, MemoryPlan, plan_memory
from veneer.plan.methods import Adapted, Trained, trained_by
from veneer.plan.shapes import ModelShape


@dataclass(frozen=True)
class Plan:
    """Settings, and what follows from them for a model. `adapted`: the layers that adapters would
    lie on; methods without adapters leave them alone."""

    config: PlanConfig
    shape: ModelShape
    adapted: tuple[Adapted, ...]
    trained: Trained
    memory: MemoryPlan
    runtime: int

    @property
    def share(self) -> float:
        """Trained parameters as a part of the base's."""
        return self.trained.count / self.shape.parameters


def make_plan(
    config: PlanConfig,
    shape: ModelShape,
    adapted: tuple[Adapted, ...] = (),
    *,
    runtime: int = RUNTIME,
) -> Plan:
    """Return the plan of training a model as `config` says, in a process of which `runtime` bytes
    are resident before any model is. Raises ConfigError for what cannot be."""
    trained = trained_by(config, shape, adapted)
    memory = plan_memory(config, shape, trained, runtime=runtime)
    return Plan(config, shape, adapted, trained, memory, runtime)


def replanned(plan: Plan, config: PlanConfig) -> Plan:
    """Return the plan for the same model with other settings."""
    return make_plan(config, plan.shape, plan.adapted, runtime=plan.runtime)


def comparison(plan: Plan) -> list[tuple[str, Plan]]:
    """Return a plan for each method under a title: the plan itself, and what others would need over
    a base that is dense (for qlora in 4 bits), with the plan's other settings.

    The first is full training as textbooks count it: 16-bit weights and gradients, Adam's numbers
    in float32. The second is Veneer's, which keeps float32 masters of the weights too. Methods that
    adapt layers are there only if the plan names layers.
    """
    settings = plan.config
    plain = replace(settings, bits=None, pack_head=False, mapped=False)
    blocks = min(settings.trained_blocks, plan.shape.depth)

    def of(method: MethodName) -> Plan:
        if method == settings.method:
            return plan
        return replanned(plan, replace(plain, method=method, trained_blocks=blocks))

    full = of("full")
    textbook = replace(
        full,
        memory=plan_memory(
            full.config,
            full.shape,
            full.trained,
            runtime=full.runtime,
            masters=False,
        ),
    )
    titled = [("full, textbook", textbook), ("full", full)]
    titled.append((f"freeze, last {blocks}", of("freeze")))
    others: tuple[MethodName, ...] = ("lora", "dora", "qlora", "prefix", "prompt")
    titled += [(name, of(name)) for name in others if plan.adapted or name not in ADAPTING]
    return titled
