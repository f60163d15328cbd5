"""What a run does where nobody says: its steps, tokens a step, learning rate, rows held out.

Every number of the rule is here; docs/training.md says what it was measured on. Importing this
imports no torch and no numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from veneer.adapter.config import LoRA
from veneer.adapter.method import Method, MethodName
from veneer.training.config import TrainConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from veneer.training.recipe import Recipe

Lengths: TypeAlias = "Sequence[int] | NDArray[np.integer]"  # tokens of each row

# The rate of adapters at a hidden size of 2000, and its fall with width: 5e-5 · 10 · (2000 / h)^P,
# P = 0.781 as fitted to Llama (Schulman et al. 2025, "LoRA Without Regret", and Tinker's documents,
# "Supervised learning: hyperparameters"). They find it the same for every rank of alpha / rank, and
# that of full fine-tuning a tenth of it.
LORA_LR, WIDTH, FALL = 5e-4, 2000, 0.781
HIGHEST_LR = 5e-3  # a bound for bases far smaller than those of the fit
SHARES: Mapping[MethodName, float] = {"lora": 1.0, "freeze": 0.5, "full": 0.1}
# Virtual tokens pass through no weight that the width changes. PEFT's guides have these.
VIRTUAL_LR: Mapping[MethodName, float] = {"prefix": 1e-2, "prompt": 3e-2}
# LoRA+ is for a B that learns faster, not for one that diverges: at most this times the rate.
MOST_OF_B = 2.0

SHARE_OF_STEP = 64  # a step has this part of all tokens, so that an epoch has about as many steps
TOKENS_PER_STEP = (32, 2048)  # at least, so that the fewest rows make some steps; and at most
MULTIPLE = 32  # of which they are one
STEPS = 200  # of the run, as far as whole epochs allow it
EPOCHS = (2, 8)  # fewer see each row once, more learn the rows by heart

FEWEST_ROWS = 100  # of which some are held out
SHARE_HELD_OUT = 20
HELD_OUT = (10, 100)


def choose(
    config: TrainConfig,
    lengths: Lengths,
    *,
    what_trains: LoRA | Method,
    hidden_size: int | None,
    share_of_rate: float = 1.0,
) -> TrainConfig:
    """Return `config` with a choice for whatever of epochs, tokens_per_step and lr is None.

    lengths: tokens of each row that is trained on. hidden_size: the base's, None for not known.
    With `steps`, epochs stay None. share_of_rate: of the objective, whose rate it is of that for
    answers.
    """
    tokens = _total(lengths)
    share = _within(tokens / SHARE_OF_STEP, TOKENS_PER_STEP)
    epochs = config.epochs
    if epochs is None and config.steps is None:
        epochs = float(round(_within(STEPS / _steps(config, lengths, share), EPOCHS)))
    rate = learning_rate(
        what_trains,
        hidden_size,
        lora_plus_ratio=config.lora_plus_ratio,
        share_of_rate=share_of_rate,
    )
    return replace(
        config,
        epochs=epochs,
        tokens_per_step=config.tokens_per_step or MULTIPLE * round(share / MULTIPLE),
        lr=config.lr or rate,
    )


def learning_rate(
    what_trains: LoRA | Method,
    hidden_size: int | None,
    *,
    lora_plus_ratio: float | None = None,
    share_of_rate: float = 1.0,
) -> float:
    """Return the peak learning rate that suits what trains over a base of `hidden_size`."""
    method = what_trains.method if isinstance(what_trains, Method) else "lora"
    if method in VIRTUAL_LR:
        return _rounded(VIRTUAL_LR[method] * share_of_rate)
    rate = min(HIGHEST_LR, LORA_LR * (WIDTH / (hidden_size or WIDTH)) ** FALL) * SHARES[method]
    if isinstance(what_trains, LoRA) and what_trains.rslora:
        rate /= what_trains.rank**0.5  # by which alpha / √rank is more than alpha / rank
    if lora_plus_ratio is not None:
        rate *= min(1.0, MOST_OF_B / lora_plus_ratio)
    return _rounded(rate * share_of_rate)


def usual_rate(recipe: Recipe, config: Any) -> float:
    """Return the rate that a recipe's run would choose over a base of this configuration."""
    return learning_rate(
        recipe.what_trains,
        hidden_size_of(config),
        lora_plus_ratio=recipe.training.lora_plus_ratio,
        share_of_rate=recipe.objective.share_of_rate,
    )


def hidden_size_of(config: Any) -> int | None:
    """Return the width of a base by its transformers configuration, None where it has none."""
    return getattr(config.get_text_config(), "hidden_size", None)


def rows_to_hold_out(rows: int) -> int:
    """Return how many of `rows` to evaluate on."""
    return int(_within(rows // SHARE_HELD_OUT, HELD_OUT)) if rows >= FEWEST_ROWS else 0


def steps_of_epoch(chosen: TrainConfig, lengths: Lengths) -> int:
    """Return how many steps the first epoch has, over rows of these lengths."""
    # Here, for it imports numpy.
    from veneer.data.packing import StepOrder

    assert chosen.tokens_per_step is not None
    limit = chosen.tokens_per_step
    return StepOrder(lengths, limit, limit, chosen.seed).steps(1)


def as_before(config: TrainConfig, earlier: Mapping[str, Any]) -> TrainConfig:
    """Return `config` with the choices of an earlier run, by its settings, wherever it has None."""
    names = ["tokens_per_step", "lr"]
    if config.epochs is None and config.steps is None:
        names += ["epochs", "steps"]
    settings: dict[str, Any] = {
        name: earlier.get(name) for name in names if getattr(config, name) is None
    }
    return replace(config, **settings)


def explain(
    given: TrainConfig,
    chosen: TrainConfig,
    lengths: Lengths,
    *,
    hidden_size: int | None,
    held_out: int | None = None,
) -> str | None:
    """Return in one line what was chosen and from what, None where nothing was.

    held_out: the rows that were chosen to be held out, None where somebody said how many.
    """
    choices = []
    if chosen.epochs != given.epochs:
        steps = steps_of_epoch(chosen, lengths)
        choices.append(f"{chosen.epochs:g} epochs of about {steps:,} step{'s' * (steps > 1)}")
    if chosen.tokens_per_step != given.tokens_per_step:
        choices.append(f"at most {chosen.tokens_per_step:,} tokens a step")
    if chosen.lr != given.lr:
        choices.append(f"learning rate {chosen.lr:g}")
    if held_out:
        choices.append(f"{held_out} rows held out (--eval-rows 0: none)")
    elif held_out == 0:
        choices.append(f"no rows held out (fewer than {FEWEST_ROWS})")
    if not choices:
        return None
    rows = "1 row" if len(lengths) == 1 else f"{len(lengths):,} rows"
    width = f" and a hidden size of {hidden_size:,}" if hidden_size else ""
    return (
        f"Chosen for {rows} of {_total(lengths):,} tokens{width}: {', '.join(choices)}. "
        "How: the page Training of the documentation"
    )


def _steps(config: TrainConfig, lengths: Lengths, usual: float) -> float:
    """Return about how many steps an epoch has; a row longer than a step has one of its own."""
    return max(1.0, min(len(lengths), _total(lengths) / (config.tokens_per_step or usual)))


def _total(lengths: Lengths) -> int:
    # A column of 32 bits may add up to more than they hold.
    return sum(lengths) if isinstance(lengths, Sequence) else int(lengths.sum(dtype="int64"))


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


def _rounded(value: float) -> float:
    """Return a number with two digits that count."""
    return float(f"{value:.2g}")
