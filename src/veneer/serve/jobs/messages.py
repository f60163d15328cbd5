"""What happens in a run as the events of its job: a text for a person, and numbers."""

from __future__ import annotations

import math

from veneer.serve.jobs.certificate import certificate_of
from veneer.serve.jobs.values import JobEvent
from veneer.training.events import (
    Checkpointed,
    DataReady,
    Doing,
    Evaluated,
    Event,
    Measured,
    Merged,
    ModelReady,
    Notice,
    Planned,
    Skipped,
    Started,
    Step,
    Stopped,
    Verdict,
    Written,
)


def event_of(event: Event, steps: int | None) -> JobEvent | None:
    """Return what a job's events say of an event of its run; nothing where that is nothing.

    steps: of the whole run, None before it has started.
    """
    match event:
        case Notice(text):
            return JobEvent(text)
        case DataReady():
            rows = event.summary
            held_out = f", and {event.held_out.rows:,} to evaluate on" if event.held_out else ""
            return JobEvent(
                f"Read {rows.rows:,} rows of {rows.tokens:,} tokens, of which "
                f"{rows.label_tokens:,} are learnt{held_out}."
            )
        case Planned():
            return JobEvent(f"Planned memory: {event.plan.memory.peak / 1e6:,.0f} MB.")
        case ModelReady():
            return JobEvent(f"{event.targets.trained:,} parameters train: {event.targets.what}.")
        case Started(total, 0):
            return JobEvent(f"Training starts: {total:,} steps.", data={"total_steps": total})
        case Started(total, done):
            text = f"Training goes on after step {done:,} of {total:,}."
            return JobEvent(text, data={"total_steps": total})
        case Step():
            reward = event.metrics.get("reward")
            of_samples = "" if reward is None else f", mean reward={reward:.4f}"
            return JobEvent(
                f"Step {event.step}/{steps}: training loss={event.loss:.4f}{of_samples}",
                data={
                    **{name: x for name, x in event.metrics.items() if math.isfinite(x)},
                    "step": event.step,
                    "total_steps": steps,
                    "train_loss": event.loss,
                    "learning_rate": event.lr,
                    "tokens": event.tokens,
                    "seconds": event.seconds,
                },
            )
        case Evaluated(metrics={"reward": reward}):
            measured = {f"valid_{name}": x for name, x in event.metrics.items()}
            return JobEvent(
                f"Step {event.step}/{steps}: validation reward={reward:.4f}",
                data={"step": event.step, "total_steps": steps, **measured},
            )
        case Evaluated(step, loss):
            # JSON has no number for a loss that is none, as where no answer has a reward.
            known = {"valid_loss": loss} if math.isfinite(loss) else {}
            return JobEvent(
                f"Step {step}/{steps}: validation loss={loss:.4f}",
                data={"step": step, "total_steps": steps, **known},
            )
        case Skipped(step, rows, why):
            text = f"Step {step} was left out: {why} ({', '.join(rows[:3])})."
            return JobEvent(text, "warn")
        case Checkpointed(step):
            return JobEvent(f"Checkpoint created at step {step}.", data={"checkpoint": step})
        case Stopped(step, "patience"):
            return JobEvent(f"Stopped at step {step}: no evaluation is better any more.")
        case Stopped(step):
            return JobEvent(
                f"Stopped after step {step}, with a checkpoint.", data={"stopped": step}
            )
        case Verdict(kind, text):
            return JobEvent(text, "info" if kind == "learnt" else "warn")
        case Doing(what):
            return JobEvent(f"{what[:1].upper()}{what[1:]} ...")
        case Measured(planned, peak):
            text = f"Most memory taken: {peak / 1e6:,.0f} MB ({planned / 1e6:,.0f} MB planned)."
            return JobEvent(text)
        case Merged(report):
            certificate = certificate_of(report)
            text = (
                f"Merged: its answers are {report.divergence:.2g} nats a token from the adapter's."
            )
            return JobEvent(text, data={"certificate": certificate})
        case Written(what, _, size):
            return JobEvent(f"Written: the {what}, {size / 1e6:,.1f} MB.")
    return None
