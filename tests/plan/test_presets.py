"""The presets of the planner against the parameters of the published models."""

import pytest

from veneer.cli.app import run
from veneer.models import minigpt
from veneer.plan.find import find_sizes, sizes_of
from veneer.plan.presets import PRESETS

# Of the published files, a tied head counted once.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "llama-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt-3": 174_604_259_328,
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-27b": 27_432_406_640,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-4-scout": 108_641_793_536,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "smollm3-3b": 3_075_098_624,
    "mistral-small-24b": 23_572_403_200,
    "mixtral-8x7b": 46_702_792_704,
    "glm-4.5": 358_337_791_296,
    "glm-4.5-air": 110_468_824_832,
}
# In 10⁹, where only a rounded figure is published.
ROUNDED = {
    "gpt-oss-20b": 20.91,
    "gpt-oss-120b": 116.83,
    "deepseek-v3": 671,
    "kimi-k2": 1026,
    "qwen3-next-80b-a3b": 80,
}
# In 10⁹, what the same sources say to compute a token, and how many matrices of the vocabulary's
# size they leave out of it: none, the embedding, or the embedding and the head.
ACTIVE = {
    "mixtral-8x7b": (12.9, 0),
    "qwen3-30b-a3b": (3.3, 0),
    "llama-4-scout": (17, 0),
    "gpt-oss-20b": (3.61, 1),
    "gpt-oss-120b": (5.13, 1),
    "deepseek-v3": (37, 1),
    "kimi-k2": (32, 1),
    "qwen3-next-80b-a3b": (3, 2),
    "glm-4.5-air": (12, 2),
}
# Gemma 3's SigLIP, in all sizes alike, and a projection with a norm; Llama 4's vision model, whole.
SIGLIP = 416_866_032
LLAMA_4_VISION = 871_932_416


def unbuilt(name):
    """Return the parameters in the published files that transformers' text model does not have."""
    description = find_sizes(name).description
    dim, vocab = (description.head.in_, description.head.out) if description.head else (0, 0)
    if name in ("gemma-3-4b", "gemma-3-12b", "gemma-3-27b"):
        return SIGLIP + 1152 * dim + 1152
    if name == "llama-4-scout":
        return LLAMA_4_VISION
    if name.startswith("glm-4.5"):
        # One more layer, which predicts a second token: a block, three norms, a projection, an
        # embedding and a head of its own. Each mixture has a bias an expert, a buffer here.
        last = f".{description.depth - 1}."
        block = sum(layer.parameters for layer in description.layers if last in layer.path)
        experts, dense = (160, 3) if name == "glm-4.5" else (128, 1)
        biases = experts * (description.depth + 1 - dense)
        return block + 3 * dim + 2 * dim**2 + 2 * vocab * dim + biases
    return 0


def test_every_preset_has_a_published_figure():
    assert {*PUBLISHED, *ROUNDED, "minigpt"} == set(PRESETS)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.thinned(one_in=3)
def test_presets_have_the_parameters_of_the_published_models(name):
    assert find_sizes(name).description.parameters + unbuilt(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.thinned(one_in=2)
def test_presets_have_the_parameters_that_a_report_rounds(name):
    published = ROUNDED[name]
    digits = len(str(published).partition(".")[2])
    assert round(find_sizes(name).description.parameters / 1e9, digits) == published


@pytest.mark.parametrize("name", ACTIVE)
def test_mixtures_have_the_active_parameters_that_are_published(name):
    published, left_out = ACTIVE[name]
    sizes = find_sizes(name)
    active = (sizes.active_parameters - left_out * sizes.description.embedding.parameters) / 1e9
    digits = len(str(published).partition(".")[2])
    # Figures are rounded; Qwen3's 3.35 is cut off.
    cut_off = name == "qwen3-30b-a3b"
    assert round(active - 0.05 if cut_off else active, digits) == published


def test_a_model_without_experts_is_active_as_a_whole():
    sizes = find_sizes("smollm2-135m")
    assert sizes.active_parameters == sizes.description.parameters


def test_the_preset_minigpt_is_what_pretrain_builds():
    assert find_sizes("minigpt") == sizes_of(minigpt.MiniGPTConfig())


# A dense one, a mixture, and our own, in every run; of the others the sizes, as above.
USUAL = ("smollm2-135m", "gpt-oss-20b", "minigpt")


@pytest.mark.parametrize(
    "name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in PRESETS]
)
def test_every_preset_can_be_planned(name, capsys):
    assert run(["plan", name, "--tokens", "512"]) == 0
    assert f"of {find_sizes(name).description.parameters:,} parameters" in capsys.readouterr().out
