"""A skill that rewards teach by GRPO: lists in JSON, or sums in a required format.

    python -m bench.rewards --skill lists --steps 400 --until 0.85
    python -m bench.rewards --steps 3 --beside-trl

Each step draws answers, judges them (bench/skills.py), and learns. What comes out are the
rewards of the first and the last steps, the reward on prompts that were never trained on, how far
sampler and trainer are apart, and where the time goes. A run ends after its steps, after so many
minutes of training, or as soon as the mean reward of five steps has come so far. With --beside-trl
the same prompts are answered by transformers' `generate`, which TRL draws with, in turns with ours.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

import veneer
from bench.skills import Skill, lists, sums
from veneer.generate.samples import SampleDecoder
from veneer.models.end_tokens import end_tokens
from veneer.objectives.config import Objective
from veneer.objectives.policy_config import OnPolicy
from veneer.rewards.judged import Answered, Weighted, judge
from veneer.run_directory import RunDirectory
from veneer.training.events import Notice, Step
from veneer.training.metrics import record
from veneer.training.on_policy.prompts import Prompts, encoded
from veneer.training.on_policy.run import context_of, train_on_policy


def decoder_of(base: Any, prompts: Prompts, config: OnPolicy) -> SampleDecoder:
    longest = max(len(row.tokens) for row in prompts.examples) + config.max_new_tokens
    ends = {*end_tokens(base.model), base.tokenizer.eos_token_id} - {None}
    context = min(longest, context_of(base.model.config))
    return SampleDecoder(base.model, ends, context=context, rows=4 * config.group_size)


def reward_on(base: Any, prompts: Prompts, config: OnPolicy, rewards: Sequence[Weighted]) -> float:
    """Return the mean reward of a group of answers to each prompt."""
    count = config.group_size
    groups = decoder_of(base, prompts, config).samples(
        [row.tokens for row in prompts.examples],
        count=count,
        most=config.max_new_tokens,
        seeds=list(range(len(prompts.examples))),
    )
    texts = [
        base.tokenizer.batch_decode([s.tokens for s in group], skip_special_tokens=True)
        for group in groups
    ]
    answers = [answered(prompts, row, text) for row, group in enumerate(texts) for text in group]
    return fmean(judge(answers, rewards).rewards)


def answered(prompts: Prompts, row: int, text: str) -> Answered:
    return Answered(text, prompts.messages(row), prompts.questions[row].references)


def beside_generate(base: Any, prompts: Prompts, config: OnPolicy, rounds: int) -> None:
    """Print tokens a second of our sampler and of transformers' `generate`, in turns."""
    decoder = decoder_of(base, prompts, config)
    rows = [row.tokens for row in prompts.examples[: config.prompts_per_step]]
    seconds: dict[str, list[float]] = {"ours": [], "generate": []}
    rates: dict[str, list[float]] = {"ours": [], "generate": []}
    pad = base.tokenizer.pad_token_id or base.tokenizer.eos_token_id
    longest = max(map(len, rows))
    for number in range(rounds):
        begun = time.process_time()
        groups = decoder.samples(
            rows, count=config.group_size, most=config.max_new_tokens, seeds=[number] * len(rows)
        )
        seconds["ours"].append(time.process_time() - begun)
        tokens = sum(len(sample.tokens) for group in groups for sample in group)
        rates["ours"].append(tokens / seconds["ours"][-1])
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        ids = ids.repeat_interleave(config.group_size, 0)
        mask = (
            torch.arange(longest) >= torch.tensor([longest - len(r) for r in rows])[:, None]
        ).long()
        begun = time.process_time()
        with torch.no_grad():
            out = base.model.generate(
                input_ids=ids,
                attention_mask=mask.repeat_interleave(config.group_size, 0),
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                max_new_tokens=config.max_new_tokens,
                pad_token_id=pad,
            )
        seconds["generate"].append(time.process_time() - begun)
        ended = torch.isin(out[:, longest:], torch.tensor([*decoder.ends, pad]))
        tokens = int((ended.cumsum(1) - ended.long() == 0).sum())  # with the one that ends it
        rates["generate"].append(tokens / seconds["generate"][-1])
    ours, theirs = median(rates["ours"]), median(rates["generate"])
    print(
        f"tokens a second of processor time: ours {ours:.1f}, transformers' generate {theirs:.1f}, "
        f"ratio {ours / theirs:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, at most")
    parser.add_argument("--until", type=float, help="mean reward of five steps at which it ends")
    parser.add_argument("--skill", choices=("lists", "sums"), default="sums")
    parser.add_argument("--largest", type=int, default=9, help="number in a sum")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompts-per-step", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--shape-weight", type=float, default=0.2)
    parser.add_argument("--kl-weight", type=float, default=0.0)
    parser.add_argument("--loss-level", default="answer")
    parser.add_argument("--plain-rewards", action="store_true", help="not divided by deviations")
    parser.add_argument("--beside-trl", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    base = veneer.load_base(args.model, dtype=args.dtype)
    veneer.attach(base.model, veneer.LoRA(rank=args.rank, targets="all"))
    config = OnPolicy(
        group_size=args.group_size,
        prompts_per_step=args.prompts_per_step,
        max_new_tokens=args.max_new_tokens,
        kl_weight=args.kl_weight,
        loss_level=args.loss_level,
        scale_rewards=not args.plain_rewards,
    )
    skill = skill_of(args)
    limits = {"context": context_of(base.model.config), "max_new_tokens": args.max_new_tokens}
    prompts = encoded(skill.training, base.tokenizer, **limits)
    held_out = encoded(skill.held_out, base.tokenizer, **limits)
    if args.beside_trl:
        beside_generate(base, prompts, config, rounds=3)
    before = reward_on(base, held_out, config, skill.rewards)
    print(f"held-out reward before: {before:.3f}", flush=True)
    directory = None if args.out is None else RunDirectory(args.out)
    begun, process = time.perf_counter(), time.process_time()
    steps: list[Step] = []

    def is_over() -> bool:
        late = time.perf_counter() - begun > 60 * args.minutes
        there = args.until is not None and reward_of(steps[-5:]) >= args.until
        return late or (there and len(steps) >= 5)

    events = train_on_policy(
        *(base.model, base.tokenizer, prompts),
        veneer.TrainConfig(steps=args.steps, lr=args.lr, schedule="constant"),
        objective=Objective("grpo"),
        on_policy=config,
        rewards=skill.rewards,
        directory=directory,
        should_stop=is_over,
    )
    for event in events if directory is None else record(events, directory):
        if isinstance(event, Notice):
            print(event.text, flush=True)
        if isinstance(event, Step):
            steps.append(event)
            m = event.metrics
            print(
                f"{time.perf_counter() - begun:6.0f} s  step {event.step:4d}  "
                f"reward {m.get('reward', 0):.3f}  of five {reward_of(steps[-5:]):.3f}  "
                f"equal {m['equal_groups']:.2f}  "
                f"entropy {m['entropy']:.2f}  tokens {m['answer_tokens']:.1f}  gap "
                f"{m['sampler_gap']:.2e} (most {m['largest_sampler_gap']:.2e})  "
                f"{m['sample_tokens_per_second']:.0f} tokens/s drawn",
                flush=True,
            )
    took, used = time.perf_counter() - begun, time.process_time() - process
    few = max(1, min(5, len(steps) // 2))
    figures = {
        "steps": len(steps),
        "seconds": round(took),
        "processor_seconds": round(used),
        "reward_first": round(reward_of(steps[:few]), 3),
        "reward_last": round(reward_of(steps[-few:]), 3),
        "mean_gap": max(step.metrics["sampler_gap"] for step in steps),
        "largest_gap": max(step.metrics["largest_sampler_gap"] for step in steps),
        "held_out_before": round(before, 3),
        "held_out_after": round(reward_on(base, held_out, config, skill.rewards), 3),
    }
    print(json.dumps(figures))


def skill_of(args: argparse.Namespace) -> Skill:
    if args.skill == "lists":
        return lists(args.held_out)
    return sums(args.held_out, largest=args.largest, shape_weight=args.shape_weight)


def reward_of(steps: Sequence[Step]) -> float:
    """Return the mean reward of some steps, 0 of less than one."""
    return fmean([step.metrics.get("reward", 0.0) for step in steps] or [0.0])


if __name__ == "__main__":
    main()
