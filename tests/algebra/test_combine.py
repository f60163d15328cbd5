"""Adapters combined: the exact sum answers as the mixture does, the others as their papers say."""

import warnings
from dataclasses import replace

import peft
import pytest
import torch
from peft.utils import merge_utils

import veneer
from support.adapter_states import assert_close, model_with, states_of, two_states, whole
from support.closeness import assert_same_logits
from support.random_adapters import logits
from support.tiny_models import tiny
from veneer.adapter.config import LoRA
from veneer.algebra.combine import combine
from veneer.formats.adapters import write
from veneer.formats.install import install

ALL = 99  # a rank that no layer of a tiny model reaches, so that nothing is cut off

PAIRS: dict[str, tuple[str, LoRA, LoRA]] = {
    "same layers": ("llama", LoRA(rank=2, targets="all"), LoRA(rank=5, targets="all")),
    "other layers": ("llama", LoRA(rank=2, targets="attention"), LoRA(rank=3, targets="mlp")),
    "some blocks": ("qwen3", LoRA(rank=2, layers="0"), LoRA(rank=2, targets="qv")),
    "embedding": (
        "qwen2",
        LoRA(rank=2, targets="embed_tokens,q_proj"),
        LoRA(rank=3, targets="embed_tokens,lm_head"),
    ),
    "Conv1D": ("gpt2", LoRA(rank=2, targets="all"), LoRA(rank=3, targets="c_attn,wpe")),
    "rsLoRA and patterns": (
        "mistral",
        LoRA(rank=4, targets="all", rslora=True, alpha=3),
        LoRA(rank=2, rank_pattern={"q_proj": 5}, alpha_pattern={r"layers\.1\..*": 9}),
    ),
    "starts": (
        "llama",
        LoRA(rank=2, targets="all", init="pissa"),
        LoRA(rank=3, targets="embed_tokens,v_proj", init="olora"),
    ),
    "MiniGPT": ("minigpt", LoRA(rank=2, targets="all"), LoRA(rank=2, targets="attention")),
}


def mixture(states, weights) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for state, weight in zip(states, weights, strict=True):
        for path, change in whole(state).items():
            total[path] = total.get(path, 0) + weight * change
    return total


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.3)], ids=str)
@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.thinned
def test_an_exact_sum_answers_as_the_mixture_at_run_time(case, weights):
    architecture, *configs = PAIRS[case]
    model = model_with(architecture, *configs)
    states = states_of(model)
    combined = combine(states, weights)
    veneer.use(model, {"0": weights[0], "1": weights[1]})
    plain = tiny(architecture)
    assert float((logits(model) - logits(plain)).abs().max()) > 1e-2
    install(plain, combined.state)
    assert_same_logits(logits(plain), model, logits)
    assert combined.energy == 1.0
    for fit in combined.layers:
        ranks = [
            len(layer.A) * (1 if layer.start is None or layer.is_embedding else 2)
            for state in states
            for layer in state.layers()
            if layer.path == fit.path
        ]
        assert fit.rank >= sum(ranks)
        assert fit.norm == pytest.approx(float(mixture(states, weights)[fit.path].norm()), rel=1e-5)


@pytest.mark.parametrize("case", ["same layers", "embedding", "Conv1D", "starts"])
def test_a_sum_is_an_adapter_like_any_other_in_both_formats(case, tmp_path):
    architecture, *configs = PAIRS[case]
    states = states_of(model_with(architecture, *configs))
    combined = combine(states, (0.7, -0.3)).state
    expected = tiny(architecture)
    install(expected, combined)
    for format in ("native", "peft"):
        write(combined, tmp_path / format, format=format)
        model = tiny(architecture)
        veneer.load(model, tmp_path / format)
        assert torch.equal(logits(model), logits(expected))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*(missing|unexpected|not combined)")
        theirs = peft.PeftModel.from_pretrained(tiny(architecture), tmp_path / "peft").eval()
    assert_same_logits(logits(theirs), expected, logits)


def test_an_adapter_less_itself_is_nothing():
    states = two_states()
    for settings in ({}, {"method": "svd", "rank": 4}, {"method": "ties", "rank": 4, "density": 1}):
        model = tiny("llama")
        install(model, combine([states[0], states[0]], (0.5, -0.5), **settings).state)
        assert_same_logits(logits(model), tiny("llama"), logits)


def test_three_adapters_at_once():
    model = model_with("llama", *(LoRA(rank=rank, targets="all") for rank in (1, 2, 3)))
    states, weights = states_of(model), (0.2, 0.5, -1.5)
    assert_close(whole(combine(states, weights).state), mixture(states, weights))


@pytest.mark.parametrize("rank", [1, 3, 5, ALL])
@pytest.mark.parametrize("case", ["same layers", "embedding", "Conv1D"])
def test_svd_errs_by_the_discarded_singular_values(case, rank):
    architecture, *configs = PAIRS[case]
    states = states_of(model_with(architecture, *configs))
    expected = mixture(states, (0.7, -0.3))
    combined = combine(states, (0.7, -0.3), method="svd", rank=rank)
    changes = whole(combined.state)
    assert changes.keys() == expected.keys()
    kept = total = 0.0
    for fit in combined.layers:
        values = torch.linalg.svdvals(expected[fit.path])
        error = float((changes[fit.path] - expected[fit.path]).norm())
        assert error == pytest.approx(float(values[rank:].norm()), abs=1e-5 * float(values.norm()))
        assert fit.energy == pytest.approx(float(values[:rank].norm() / values.norm()) ** 2)
        assert fit.rank <= rank
        kept += float(values[:rank].square().sum())
        total += float(values.square().sum())
    assert combined.energy == pytest.approx(kept / total)


def reference_ties(states, weights, density):
    """TIES of Yadav et al. 2023, algorithm 1, over whole vectors."""
    vectors = []
    for state, weight in zip(states, weights, strict=True):
        changes = {path: weight * change.float() for path, change in whole(state).items()}
        flat = torch.cat([change.flatten() for change in changes.values()])
        least = flat.abs().sort(descending=True).values[int(density * len(flat)) - 1]
        vectors.append({p: x * (x.abs() >= least * (1 - 1e-6)) for p, x in changes.items()})
    merged = {}
    for path in dict.fromkeys(path for vector in vectors for path in vector):
        like = next(vector[path] for vector in vectors if path in vector)
        each = torch.stack([vector.get(path, torch.zeros_like(like)) for vector in vectors])
        elected = torch.sign(each.sum(0))
        total, count = torch.zeros_like(like), torch.zeros_like(like)
        for change in each:
            same = (torch.sign(change) == elected) & (change != 0)
            total[same] += change[same]
            count[same] += 1
        merged[path] = total / count.clamp(min=1)
    return {path: change.double() for path, change in merged.items()}


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.3)], ids=str)
@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("case", ["same layers", "other layers", "embedding", "Conv1D", "starts"])
@pytest.mark.thinned
def test_ties_is_the_paper_s(case, density, weights):
    architecture, *configs = PAIRS[case]
    states = states_of(model_with(architecture, *configs))
    combined = combine(states, weights, method="ties", rank=ALL, density=density)
    assert_close(whole(combined.state), reference_ties(states, weights, density))
    assert combined.energy == pytest.approx(1.0)


def test_ties_weighs_before_it_elects_so_that_a_negative_weight_takes_away():
    one, two_ = two_states()
    opposite = replace(
        two_, tensors={k: -x if k.endswith("lora_B") else x for k, x in two_.tensors.items()}
    )
    settings = {"method": "ties", "rank": ALL, "density": 0.5}
    taken = combine([one, two_], (1.0, -1.0), **settings)
    assert_close(whole(taken.state), whole(combine([one, opposite], (1.0, 1.0), **settings).state))


def with_peft(configs: tuple[LoRA, ...], states, name: str, **options) -> dict[str, torch.Tensor]:
    """Let PEFT combine the same adapters; return what it adds to each layer."""
    model = None
    for n, (config, state) in enumerate(zip(configs, states, strict=True)):
        theirs = peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=sorted({"q_proj"})
        )
        if model is None:
            model = peft.get_peft_model(tiny("llama"), theirs, adapter_name="0")
        else:
            model.add_adapter(str(n), theirs)
        for path, layer in model.base_model.model.named_modules():
            if hasattr(layer, "lora_A"):
                for half in ("lora_A", "lora_B"):
                    getattr(layer, half)[str(n)].weight.data.copy_(state.tensors[f"{path}.{half}"])
    assert model is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(
            [str(n) for n in range(len(states))], adapter_name="c", combination_type=name, **options
        )
    return {
        path: layer.get_delta_weight("c").double()
        for path, layer in model.base_model.model.named_modules()
        if hasattr(layer, "lora_A")
    }


@pytest.mark.parametrize(
    ("theirs", "method", "ours", "options"),
    [
        ("cat", "sum", {}, {}),
        ("svd", "svd", {"rank": 3}, {"svd_rank": 3}),
        # PEFT elects before it weighs, so that the two agree where all weights are the same.
        ("ties_svd", "ties", {"rank": 3, "density": 0.25}, {"svd_rank": 3, "density": 0.25}),
        (
            "magnitude_prune_svd",
            "magnitude_prune",
            {"rank": 3, "density": 0.25},
            {"svd_rank": 3, "density": 0.25},
        ),
    ],
)
def test_peft_combines_to_the_same(theirs, method, ours, options):
    # PEFT trims each layer by itself, the paper an adapter as a whole: one layer is both.
    configs = tuple(LoRA(rank=rank, targets="q_proj", layers="0") for rank in (2, 4))
    weights = (0.6, 0.6) if method == "ties" else (0.7, -0.3)
    states = states_of(model_with("llama", *configs))
    path = "model.layers.0.self_attn.q_proj"
    full = [
        replace(
            s,
            tensors=s.tensors
            | {
                f"{p}.{k}": torch.zeros_like(s.tensors[f"{path}.{k}"])
                for p in ("model.layers.1.self_attn.q_proj",)
                for k in ("lora_A", "lora_B")
            },
        )
        for s in states
    ]
    expected = with_peft(configs, full, theirs, weights=list(weights), **options)[path]
    combined = whole(combine(states, weights, method=method, **ours).state)
    assert combined.keys() == {path}
    # Where entries are as good as equal, one more or less is kept.
    torch.testing.assert_close(combined[path], expected, rtol=1e-4, atol=1e-5)


def test_adapters_of_some_blocks_alone_keep_to_them(tmp_path):
    some, other = states_of(
        model_with("llama", LoRA(rank=2, targets="v_proj", layers="1"), LoRA(rank=3))
    )
    # As PEFT's layers_to_transform are read: names, and the blocks beside them.
    some = replace(some, config=replace(some.config, targets="v_proj", layers="1"))
    for states, expected in (([some], 1), ([some, some], 1), ([some, other], 8)):
        weights = [0.5] * len(states)
        combined = combine(states, weights).state
        assert len(list(combined.layers())) == expected
        install(tiny("llama"), combined)
        assert_close(whole(combined), mixture(states, weights))


def test_magnitude_prune_keeps_the_largest_of_each_layer():
    states, weights = two_states(), (0.7, -0.3)
    combined = combine(states, weights, method="magnitude_prune", rank=ALL, density=0.25)
    changes = [whole(state) for state in states]
    expected = {
        path: merge_utils.magnitude_prune(
            [change[path].float() for change in changes], torch.tensor(weights), 0.25
        ).double()
        for path in changes[0]
    }
    assert_close(whole(combined.state), expected)


def test_dare_keeps_a_part_and_makes_it_larger():
    (one, _), density = two_states(), 0.3
    change = whole(one)
    combined = whole(combine([one], [1.0], method="dare", rank=ALL, density=density).state)
    kept = entries = 0
    for path, delta in change.items():
        is_zero = combined[path].abs() < 1e-5 * float(delta.abs().max())
        torch.testing.assert_close(
            combined[path][~is_zero], delta[~is_zero] / density, rtol=1e-2, atol=1e-5
        )
        kept += int((~is_zero).sum())
        entries += delta.numel()
    assert kept / entries == pytest.approx(density, abs=0.01)


def test_dare_draws_for_each_adapter_and_layer_by_the_seed_alone():
    states = two_states()

    def dare(states, seed=0, method="dare"):
        weights = [1.0] * len(states)
        made = combine(states, weights, method=method, rank=ALL, density=0.5, seed=seed)
        return whole(made.state)

    first = dare(states)
    assert_close(dare(states), first, 0.0)
    other = dare(states, seed=1)
    path = next(iter(first))
    assert float((other[path] - first[path]).norm()) > 0.1 * float(first[path].norm())
    twice = dare([states[0]] * 2)  # of two equal ones other entries go
    once = dare([states[0]])
    assert float((twice[path] - 2 * once[path]).norm()) > 0.1 * float(once[path].norm())
    # A layer's draw hangs on no other layer.
    config = replace(states[0].config, targets="q_proj", layers=None)
    alone = replace(
        states[0],
        config=config,
        tensors={k: x for k, x in states[0].tensors.items() if "q_proj" in k},
    )
    assert_close(dare([alone]), {p: x for p, x in once.items() if "q_proj" in p})


def test_layers_of_one_shape_draw_apart():
    (one, _), settings = two_states(), {"method": "dare", "rank": ALL, "density": 0.5}
    combined = whole(combine([one], [1.0], **settings).state)
    masks = [combined[f"model.layers.{n}.self_attn.q_proj"].abs() > 1e-6 for n in (0, 1)]
    assert not torch.equal(*masks)


def test_with_all_entries_kept_dare_is_the_sum_and_dare_ties_is_ties():
    states, weights = two_states(), (0.7, -0.3)
    all_ = {"rank": ALL, "density": 1.0}
    assert_close(
        whole(combine(states, weights, method="dare", **all_).state), mixture(states, weights)
    )
    assert_close(
        whole(combine(states, weights, method="dare_ties", **all_).state),
        whole(combine(states, weights, method="ties", **all_).state),
    )


def test_dare_ties_takes_the_mean_of_those_that_agree():
    (one, _), settings = two_states(), {"rank": ALL, "density": 0.5}
    combined = whole(combine([one, one], (1.0, 1.0), method="dare_ties", **settings).state)
    for path, change in whole(one).items():
        # Of two equal changes, one or both of which stay, the mean is what one is.
        large = change.abs() > 0.1 * change.abs().max()
        ratio = combined[path][large] / change[large]
        near = torch.where(ratio > 1, torch.tensor(2.0).double(), torch.tensor(0.0).double())
        torch.testing.assert_close(ratio, near, rtol=1e-2, atol=1e-2)
        assert 0.65 < float((ratio > 1).double().mean()) < 0.85  # 1 − 0.5² of them
