"""The pretend GPU: what runs on it, and what the watch over it sees."""

import pytest

from gpu.harness_cases import QUIET, WAITING


def test_a_step_of_plain_torch(pretend):
    assert pretend("harness_cases", "step") == {"waits": [], "devices": ["cuda:0"]}


def test_attention_in_16_bits(pretend):
    expected = {"waits": [], "dtype": "torch.bfloat16", "shape": [1, 2, 8, 16]}
    assert pretend("harness_cases", "attention") == expected


def test_a_copy_on_the_card_keeps_ties_and_leaves_the_model_alone(pretend):
    assert pretend("harness_cases", "ties") == {"tied": True, "own": True}


def test_the_host_computes_with_true_numbers(pretend):
    assert pretend("harness_cases", "host") == {"waits": [], "places": [0, 2]}


def test_tensors_of_two_devices_do_not_mix(pretend):
    raised = pretend("harness_cases", "another device")["raised"]
    assert "cuda:0" in raised
    assert "cpu" in raised


def test_what_is_on_its_way_is_waited_for_in_its_own_devices_stream(pretend):
    """And not in one of the thread's current device."""
    assert pretend("harness_cases", "stream") == ["cuda:0"]


@pytest.mark.parametrize("operation", WAITING)
def test_what_waits_is_noted(operation, pretend):
    assert len(set(pretend("harness_cases", f"waiting: {operation}"))) == 1


@pytest.mark.parametrize("operation", QUIET)
def test_what_does_not_wait_is_not(operation, pretend):
    assert pretend("harness_cases", f"quiet: {operation}") == []
