"""The passes in which samples are computed: every sample once, each prompt once where it can be."""

from itertools import chain

from hypothesis import example, given
from hypothesis import strategies as st

from veneer.data.encode import UNLABELLED, Example
from veneer.data.packing import pack, sharing_prompts
from veneer.training.on_policy.passes import passes_of

GROUPS = st.integers(1, 4).flatmap(
    lambda size: st.lists(
        st.tuples(st.integers(2, 12), st.lists(st.integers(1, 9), min_size=size, max_size=size)),
        min_size=1,
        max_size=4,
    )
)


# Two short answers share a pass, and their prompt, that the long one between them has no place in.
@example(groups=[(2, [1, 9, 1])], limit=11, shares=True)
@given(groups=GROUPS, limit=st.integers(5, 60), shares=st.booleans())
def test_every_sample_is_in_a_pass_that_computes_its_prompt_once(groups, limit, shares):
    examples = [
        Example(
            [*range(number, 100 * prompt, 100), *range(answer)],  # no two prompts begin alike
            [UNLABELLED] * prompt + [*range(answer)],
            "sample",
            0,
        )
        for number, (prompt, answers) in enumerate(groups, start=20)
        for answer in answers
    ]
    group = len(groups[0][1]) if shares else 1
    order, passes = passes_of(examples, group=group, tokens_per_batch=limit, seed=0)
    assert sorted(chain(*passes)) == list(range(len(examples)))
    computed = 0
    for rows in passes:
        batch = pack(examples, rows)
        tokens = len((sharing_prompts(batch) if shares else batch).tokens)
        assert tokens <= limit or len(rows) == 1
        computed += tokens
    assert computed <= sum(order.lengths)
    if not shares or len(order.lengths) == len(groups):  # each group in one pass
        assert computed == sum(order.lengths)
    if shares and len(passes) == 1:
        assert computed == sum(p + sum(a + 1 for a in own) - 1 for p, own in groups)
