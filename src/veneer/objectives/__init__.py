"""What a run learns by, as values: from the log-probabilities of a batch to a loss.

How a step asks for its loss (`training/step.py`):

1. A run's steps name a `Criterion` (`criterion.py`) beside their rows.
2. `criterion.counts(batch)` gives what else a batch counts beside its label tokens (pairs, say).
   They are added up over all batches and processes of the step, to `StepCounts`.
3. The forward pass gives −log p of each label token of the batch, (labelled,), in float32 and with
   a gradient; `rows_of(batch)` says whose each is. A criterion that learns more of a token than its
   label gives what to compute there instead, `token_loss`: chunks of logits go through it.
4. `criterion(losses, batch, counts)` returns an `Outcome`: the sum of the losses of whatever the
   criterion divides by, and sums of what is measured beside, by `criterion.metrics`.
5. The step divides the sum by `criterion.divisor(counts)`, so that a step of many batches equals
   one large batch, and goes back through the model. Metrics are divided by the same number.

Whatever knows more of a row than its tokens (a reference's log-probabilities, an advantage, a
teacher) is an array of a number for each example, which the criterion reads at `batch.rows`.
"""
