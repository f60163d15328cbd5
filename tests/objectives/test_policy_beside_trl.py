"""GRPO, Dr. GRPO, DAPO and RLOO on fixed samples and rewards: loss and gradients are TRL's."""

from __future__ import annotations

import copy
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import veneer
from support.closeness import assert_gradients_no_further, assert_no_further
from support.random_adapters import ids, shake
from support.tiny_models import tiny
from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import pack
from veneer.fused.forward import choose_forward
from veneer.objectives import policy
from veneer.objectives.criterion import StepCounts
from veneer.objectives.on_policy import Drawn, PolicyCriterion
from veneer.objectives.policy_config import OnPolicy

pytestmark = pytest.mark.slow

PROMPTS, LENGTHS, GROUP, MOST = (5, 9), (3, 7, 1, 6, 7, 2, 4, 5), 4, 8
REWARDS = torch.tensor([[1.0, 0.0, 0.5, 0.0], [2.0, 0.0, 1.0, 4.0]])
CASES = {
    "grpo": (OnPolicy(kl_weight=0.04, max_new_tokens=MOST), "group", True),
    "dr_grpo": (OnPolicy(loss_level="budget", max_new_tokens=MOST), "group", False),
    "dapo": (
        OnPolicy(loss_level="token", clip_high=0.28, importance_cap=1.01, max_new_tokens=MOST),
        *("group", True),
    ),
    "rloo": (OnPolicy(max_new_tokens=MOST), "others", False),
}


def samples():
    """Return rows of a prompt and an answer each, of which the answer is learnt."""
    rows = []
    for i, length in enumerate(LENGTHS):
        prompt = ids(1, PROMPTS[i // GROUP], seed=i // GROUP)[0].tolist()
        answer = ids(1, length, seed=10 + i)[0].tolist()
        labels = [UNLABELLED] * len(prompt) + answer
        rows.append(Example(prompt + answer, labels, f"sample {i}", 0))
    return rows


def random_log_p(seed, near):
    """Return log-probabilities near to others, such as other weights would give."""
    noise = torch.randn(len(near), generator=torch.Generator().manual_seed(seed))
    return near + 0.2 * noise.to(near)


def their_loss(name, model, rows, config, *, advantages, old, sampled, reference):
    """Return TRL's loss over the same rows, padded on both sides."""
    from trl.trainer import grpo_trainer, rloo_trainer

    kind = rloo_trainer.RLOOTrainer if name == "rloo" else grpo_trainer.GRPOTrainer

    class Theirs(kind):
        def __init__(self):
            self.__dict__["model"] = model

        def _get_per_token_logps_and_entropies(self, model, ids, mask, keep, **options):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            logs = logits[:, -keep - 1 : -1].log_softmax(-1)
            own = logs.gather(2, ids[:, -keep:, None])[..., 0]
            return own, -(logs.exp() * logs).sum(-1), None

    trainer = Theirs()
    identity = SimpleNamespace(
        gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, **_: x, num_processes=1
    )
    settings = {
        "accelerator": identity,
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": config.kl_weight,
        "loss_type": name,
        "epsilon_low": config.clip_low,
        "epsilon_high": config.clip_high,
        "use_vllm": config.importance_cap is not None,
        "vllm_importance_sampling_correction": True,
        "max_completion_length": MOST,
        "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
    }
    for key, value in settings.items():
        setattr(trainer, key, value)

    def padded(values, left=False):
        longest = max(map(len, values))
        rows = [
            [0] * (longest - len(v)) + [*v] if left else [*v] + [0] * (longest - len(v))
            for v in values
        ]
        return torch.tensor(rows)

    prompts = [row.tokens[: -row.label_tokens] for row in rows]
    answers = [row.tokens[-row.label_tokens :] for row in rows]
    inputs = {
        "prompt_ids": padded(prompts, left=True),
        "prompt_mask": padded([[1] * len(p) for p in prompts], left=True),
        "completion_ids": padded(answers),
        "completion_mask": padded([[1] * len(a) for a in answers]),
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(float(sum(LENGTHS))),
    }
    of_tokens = {
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "importance_sampling_ratio": policy.truncated_weight(
            old, sampled, most=config.importance_cap or 1.0
        ),
    }
    for key, values in of_tokens.items():
        inputs[key] = padded([v.tolist() for v in values.split(LENGTHS)]).to(values)
    inputs["old_logps"] = torch.stack([values.sum() for values in old.split(LENGTHS)])
    return trainer._compute_loss(model, inputs)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_trl(name):
    config, baseline, scale = CASES[name]
    model = veneer.attach(tiny("llama"), veneer.LoRA(rank=4, targets="all"))
    model = shake(model, size=0.2).eval()
    rows = samples()
    forward, _ = choose_forward(model, rows, answer_one_prompt=True)
    assert forward.shares
    whole = pack(rows, range(len(rows)))
    with torch.no_grad():
        near = -forward.losses(model, whole)
    old, sampled, reference = (random_log_p(seed, near) for seed in (1, 2, 3))
    advantages = policy.advantages(REWARDS, baseline=baseline, scale=scale).flatten()

    drawn = Drawn(
        advantages.tolist(),
        [values.tolist() for values in sampled.split(LENGTHS)],
        [values.tolist() for values in reference.split(LENGTHS)] if config.kl_weight else None,
    )
    criterion = PolicyCriterion(config, drawn, name == "rloo")
    criterion.old |= dict(enumerate(old.split(LENGTHS)))
    counts = StepCounts(sum(LENGTHS), (len(rows),))
    weights = {n: w for n, w in model.named_parameters() if w.requires_grad}
    ours = torch.zeros(())
    for indices in ([4, 1, 3], [0, 2, 7], [5, 6]):  # in several passes, in any order
        batch = pack(rows, indices)
        loss = criterion(forward.losses(model, batch), batch, counts).loss
        loss = loss / criterion.divisor(counts)
        loss.backward()
        ours = ours + loss.detach()
    gradients = {n: w.grad.clone() for n, w in weights.items()}

    def theirs(model, dtype):
        numbers = {"advantages": advantages, "old": old, "sampled": sampled, "reference": reference}
        numbers = {key: values.to(dtype) for key, values in numbers.items()}
        weights = {n: w for n, w in model.named_parameters() if w.requires_grad}
        loss = their_loss(name, model, rows, config, **numbers)
        return loss.detach(), dict(
            zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)
        )

    loss, own = theirs(model, torch.float32)
    exact, expected = theirs(copy.deepcopy(model).double(), torch.float64)
    assert_no_further(ours, loss, exact, least=1.0)
    assert_gradients_no_further(gradients, own, expected)
