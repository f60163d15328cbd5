"""Memory on the pretend GPU: as planned, and a base that stays beside it."""

import pytest

from gpu import memory_cases, offload_cases


def assert_planned(case, result):
    # What the plan adds for CUDA's own memory is no tensor.
    planned = sum(size for name, size in result["plan"].items() if name != "runtime")
    ratio = planned / result["peak"]
    print(f"| {case} | {planned / 1e6:,.1f} | {result['peak'] / 1e6:,.1f} | {ratio:.3f} |")
    assert 0.95 <= ratio <= 1.05, (planned, result)


@pytest.mark.parametrize("case", memory_cases.CASES)
def test_the_planned_peak_is_that_of_fake_tensors(case, pretend):
    assert_planned(case, pretend("memory_cases", case))


@pytest.mark.slow
@pytest.mark.parametrize("case", memory_cases.SLOW_CASES)
def test_it_is_so_for_published_shapes(case, pretend):
    assert_planned(case, pretend("memory_cases", case, "SLOW_CASES"))


def assert_streams(result):
    assert result["waits"] == []
    assert result["most_whole"] == 2 < result["buffers"]
    assert result["devices"] == ["cuda:0"]
    assert result["events"][-1] == "Trained"


@pytest.mark.parametrize("case", offload_cases.CASES)
def test_an_offloaded_base_makes_nobody_wait(case, pretend):
    assert_streams(pretend("offload_cases", case))


@pytest.mark.slow
@pytest.mark.parametrize("case", offload_cases.SLOW_CASES)
def test_neither_does_one_on_the_disk_or_a_quantized_one(case, pretend):
    assert_streams(pretend("offload_cases", case, "SLOW_CASES"))
