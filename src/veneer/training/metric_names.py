"""What the numbers in a line of metrics.jsonl mean, each by its name.

`training/metrics.py` writes the lines. Numbers of evaluations that an objective measures have
`eval_` before their names.
"""

from __future__ import annotations

STEPS = {
    "step": "The optimizer step, from 1 on.",
    "loss": "The mean loss of a label token, in nats, or what the objective takes the mean of.",
    "lr": "The learning rate of this step.",
    "tokens": "Real tokens of its rows; a prompt that rows share counts in each.",
    "label_tokens": "Tokens among them that were learnt.",
    "seconds": "How long the step took.",
    "rss_bytes": "The resident memory of the process after the step, in bytes.",
}
EVALUATIONS = {
    "step": "The step after which held-out rows were measured; 0 is before the first.",
    "eval_loss": "The mean loss of their label tokens, in nats, or what the objective means; of "
    "held-out prompts their mean reward with its sign turned, or how far the teacher is.",
    "perplexity": "exp(eval_loss); null where the loss is not that of tokens.",
}
PAIRS = {
    "reward_chosen": "β times what the loss compares, of chosen answers, in the mean.",
    "reward_rejected": "The same of rejected answers.",
    "accuracy": "The share of pairs whose chosen answer has the higher reward; ties count half.",
    "margin": "The reward of the chosen answer less that of the rejected one, in the mean.",
    "nll": "The mean loss of a token of the chosen answers, in nats.",
}
JUDGED = {
    "reward_desirable": "The rewards of desirable answers, divided by all answers.",
    "reward_undesirable": "The rewards of undesirable answers, divided by all answers.",
    "kl": "The distance from the reference that KTO's loss measures from, in nats.",
}
SAMPLES = {
    "reward": "The mean reward of the step's answers; absent where none is known.",
    "reward_deviation": "The standard deviation of these rewards.",
    "reward/NAME": "The mean of one reward, by its name.",
    "equal_groups": "The share of groups whose answers all have one reward, which teach nothing.",
    "resampled_groups": "How many groups were drawn again for that (--resample); absent without.",
    "answer_tokens": "The mean length of an answer, in tokens.",
    "longest_answer": "The length of the longest answer, in tokens.",
    "cut_answers": "The share of answers that --max-new-tokens cut off.",
    "entropy": "The mean entropy of the distribution that each token was drawn from, in nats.",
    "reward_faults": "How many rewards raised, hung or were no number.",
    "sample_tokens_per_second": "Tokens of answers drawn in a second.",
    "kl": "The distance from the reference (the k3 estimate) of a token, in nats, in the mean.",
    "clipped": "The share of tokens whose ratio was clipped.",
    "sampler_gap": "How far the trainer's log-probability is from the sampler's, in the mean.",
    "sampler_bias": "The same with its sign.",
    "largest_sampler_gap": "The largest of these distances.",
}
BY_KIND = {
    "A step": STEPS,
    "An evaluation": EVALUATIONS,
    "Beside, with preferences (dpo, ipo, simpo, orpo, cpo)": PAIRS,
    "Beside, with judged answers (kto)": JUDGED,
    "Beside, with samples and, if there are any, rewards (grpo, rloo, distill)": SAMPLES,
}
