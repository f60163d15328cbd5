"""Bodies of requests for jobs: OpenAI's parameters, and beside them the settings of `tune`."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

from pydantic import Field, create_model

from veneer.errors import RequestError, listed
from veneer.objectives.config import ON_POLICY, USUAL_BETA
from veneer.serve.api.strict import Strict, Text
from veneer.serve.jobs.service import Order
from veneer.serve.jobs.settings import AUTO, GROUPS, OF_EVALUATION, OWN, group_size

MethodType = Literal["supervised", "dpo", "reinforcement"]
# What may be learnt by, with each method, the usual one first.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "supervised": ("sft",),
    "dpo": tuple(USUAL_BETA),
    "reinforcement": ON_POLICY,
}
Effort = Literal["default", "low", "medium", "high"]


class Hyperparameters(Strict):
    """OpenAI's own settings of a supervised training."""

    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=1000)] | None = None
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=1000)] | None = None
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=65536)] | None = None


class Supervised(Strict):
    """What the method "supervised" takes."""

    hyperparameters: Hyperparameters | None = None


class PreferenceHyperparameters(Hyperparameters):
    """OpenAI's own settings of a training on preferences."""

    beta: Literal["auto"] | Annotated[float, Field(gt=0, le=1000)] | None = None


class Dpo(Strict):
    """What the method "dpo" takes."""

    hyperparameters: PreferenceHyperparameters | None = None


class SampleHyperparameters(Hyperparameters):
    """OpenAI's own settings of a training on samples."""

    compute_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=100)] | None = None
    eval_interval: Literal["auto"] | Annotated[int, Field(ge=1)] | None = None
    eval_samples: Literal["auto"] | Annotated[int, Field(ge=1)] | None = None
    reasoning_effort: Effort | None = None


class Reinforcement(Strict):
    """What the method "reinforcement" takes. The grader is read by `rewards/graders.py`."""

    grader: dict[Text, Any]
    hyperparameters: SampleHyperparameters | None = None


OF_METHOD: dict[str, type[Hyperparameters]] = {
    "supervised": Hyperparameters,
    "dpo": PreferenceHyperparameters,
    "reinforcement": SampleHyperparameters,
}


class JobMethod(Strict):
    """By what to train."""

    type: MethodType
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforcement | None = None


class OpenAiJob(Strict):
    """POST /v1/fine_tuning/jobs, as OpenAI has it."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"integrations": ([],)}

    model: Annotated[Text, Field(max_length=512)]
    training_file: Annotated[Text, Field(max_length=80)]
    validation_file: Annotated[Text, Field(max_length=80)] | None = None
    hyperparameters: Hyperparameters | None = None
    method: JobMethod | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    suffix: Annotated[Text, Field(min_length=1, max_length=64)] | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[Text, Field(max_length=64)],
                Annotated[Text, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None

    def order(self) -> Order:
        """Return what is asked for. Raises RequestError for what is not trained here, by name."""
        method = self.method or JobMethod(type="supervised")
        for name in get_args(MethodType):
            if name != method.type and getattr(method, name) is not None:
                raise RequestError(f"{name} would do nothing with {method.type}.", param="method")
        given = getattr(method, method.type)
        of_method = given and given.hyperparameters
        if of_method and self.hyperparameters:
            raise RequestError("Give hyperparameters once, in method.", param="hyperparameters")
        given_ones = of_method or self.hyperparameters or Hyperparameters()
        chosen = OF_METHOD[method.type](**given_ones.model_dump())
        own = {name: v for name in OWN if (v := getattr(self, name)) is not None}
        objective, objectives = own.pop("objective", None), OBJECTIVES[method.type]
        if objective not in (None, *objectives):
            raise RequestError(
                f"With the method {method.type}, objective may be {listed(objectives, most=9)}.",
                param="objective",
            )
        if method.type != "supervised":
            own["objective"] = objective or objectives[0]
        beta = getattr(chosen, "beta", None)
        if beta not in (None, AUTO) and own.setdefault("beta", beta) != beta:
            raise RequestError("Give beta once, in method.", param="beta")
        if method.type == "reinforcement" and method.reinforcement is None:
            why = "The method reinforcement needs a grader, in method.reinforcement."
            raise RequestError(why, param="method")
        # Others have none beside them, which would do nothing.
        grader = None if method.reinforcement is None else method.reinforcement.grader
        return Order(
            self.model,
            self.training_file,
            self.validation_file,
            _named(chosen),
            own,
            self.seed or 0,
            self.suffix,
            self.metadata,
            grader,
            _remarks(chosen, self.validation_file),
        )


def _named(given: Hyperparameters) -> dict[str, Any]:
    """Return the hyperparameters of a method by their names, "auto" where one is not given."""
    usual = dict.fromkeys(type(given).model_fields, AUTO) | {"reasoning_effort": "default"}
    return {name: getattr(given, name) or usual[name] for name in type(given).model_fields}


def _remarks(given: Hyperparameters, validation_file: str | None) -> tuple[str, ...]:
    """Return what to tell of settings for samples: what they come to, and which do nothing here."""
    if not isinstance(given, SampleHyperparameters):
        return ()
    remarks = []
    if isinstance(given.compute_multiplier, float):
        answers = group_size(given.compute_multiplier)
        remarks.append(f"compute_multiplier: {answers} answers are drawn to each prompt.")
    names = [name for name in OF_EVALUATION if getattr(given, name) not in (None, AUTO)]
    if names and validation_file is None:
        remarks.append(f"{listed(names)}: without a validation_file this does nothing.")
    if given.reasoning_effort not in (None, "default"):
        remarks.append("reasoning_effort: the base is asked as it is, so this does nothing.")
    return tuple(remarks)


def _own_fields() -> dict[str, Any]:
    """Return the settings of a run as fields of a body, each with its type and its help."""
    hints = {group: get_type_hints(config) for group, config in GROUPS.items()}
    return {
        field.name: (hints[group][field.name] | None, None)
        for group, config in GROUPS.items()
        for field in fields(config)
        if OWN.get(field.name) == group
    }


JobRequest = create_model(
    "JobRequest", __base__=OpenAiJob, __doc__=OpenAiJob.__doc__, **_own_fields()
)


class RowsRequest(Strict):
    """POST /api/rows: how the model reads a file's first rows."""

    file: Annotated[Text, Field(max_length=80)]
    model: Annotated[Text, Field(max_length=512)]


class PlanRequest(Strict):
    """POST /api/plan: what an adapter would take to train, over so many rows of so many tokens."""

    rank: Annotated[int, Field(ge=1, le=4096)]
    targets: Annotated[Text, Field(min_length=1, max_length=512)]
    rows: Annotated[int, Field(ge=0, le=10**12)] = 0
    tokens: Annotated[int, Field(ge=0, le=10**15)] = 0
    epochs: Annotated[float, Field(gt=0, le=1000)] | None = None


class MergeRequest(Strict):
    """POST /api/merges: an adapter to merge into the base."""

    model: Annotated[Text, Field(max_length=512)]
