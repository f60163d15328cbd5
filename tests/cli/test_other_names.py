"""What other programs call a flag is answered with its name here."""

from pathlib import Path

import pytest
import yaml

from veneer.cli.other_names import NOTES, OTHERS, OURS, our_name
from veneer.training.recipe import Recipe


@pytest.mark.parametrize(
    ("theirs", "ours"),
    {
        "--learning-rate": "--lr",
        "--learning_rate": "--lr",
        "--learning-rate=1e-4": "--lr",
        "--batch-size": "--tokens-per-batch",
        "--per-device-train-batch-size": "--tokens-per-batch",
        "--gradient-accumulation-steps": "--tokens-per-step",
        "--num-epochs": "--epochs",
        "--num-train-epochs": "--epochs",
        "--iters": "--steps",
        "--lora-r": "--rank",
        "--lora-rank": "--rank",
        "-r": "--rank",
        "--lora-alpha": "--alpha",
        "--lora-dropout": "--dropout",
        "--target-modules": "--targets",
        "--max-seq-length": "--max-length",
        "--load-in-4bit": "--bits 4",
        "--gradient-checkpointing": "--recompute full",
    }.items(),
)
def test_a_flag_of_another_program_is_answered_with_ours(theirs, ours, caught, refused):
    error = refused("tune", "m", "d", theirs, "4")
    assert f"{theirs.partition('=')[0]} is called {ours} here" in error
    assert NOTES.get(ours[2:].replace("-", "_"), "") in error
    assert caught.recipe is None


def test_all_names_lead_to_flags_of_tune_and_are_none_themselves():
    settings = {*Recipe("m", Path("d")).settings(), "resume", "track"}
    assert {flag.partition(" ")[0] for flag in OTHERS} <= settings
    assert not settings & set(OURS)
    assert len(OURS) == sum(len(names.split()) for names in OTHERS.values())
    flags = [f"--{setting}" for setting in settings]
    for theirs in OURS:  # the command line says so, as some of them show above
        assert str(our_name(f"--{theirs}", flags)).startswith(f"--{theirs} is called --")


def test_a_command_of_another_program_is_answered_with_ours(refused):
    assert 'Did you mean "tune"?' in refused("train", "m", "d")
    assert 'Did you mean "merge"?' in refused("fuse", "m")
    error = refused("tune", "m", "d", "--train", "--iters", "3")
    assert "--train is not needed, for the command always trains; leave it out." in error


def test_only_what_the_command_has_is_named(refused):
    assert "--lora-r is called --rank here" in refused("plan", "gpt2", "--lora-r", "4")
    assert "called" not in refused("plan", "gpt2", "--learning-rate", "1")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    {
        "--learning-rate": "--lr.lora here; every method has its rate",
        "--lr": "--lr.lora here; every method has its rate",
        "--lora-r": "--ranks",
        "--rank": "--ranks",
        "--target-modules": "--target-sets",
        "--max-steps": "--budget steps:N",
        "--batch-size": "--tokens-per-step",
        "--method": "--methods",
    }.items(),
)
def test_compare_answers_with_flags_of_its_own(theirs, ours, refused):
    assert f"{theirs} is called {ours}" in refused("compare", "m", "d", theirs, "4")
    assert our_name("--rank", ("--lr", "--targets")) is None


def test_keys_of_a_recipe_are_answered_too(caught, tmp_path, refused):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": "m", "data": "d", "lora_r": 4, "load_in_4bit": 1}))
    error = refused("tune", "--config", recipe)
    assert "load_in_4bit is called bits: 4 here; lora_r is called rank here" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("tune m d --targets q_proj v_proj", "by commas: --targets q_proj,v_proj."),
        ("tune m d --targets q_proj v_proj --rank 4", "by commas: --targets q_proj,v_proj."),
        ("tune --targets q_proj v_proj m d", "separated by commas."),
        ("inspect m --targets q_proj k_proj v_proj", "--targets q_proj,k_proj,v_proj."),
        ("compare m d --methods lora qlora", "--methods lora,qlora."),
        ("compare m d --ranks 1 4", "--ranks 1,4."),
        ("tune m d e --targets q_proj", "Unused Tokens: ['e']"),
    ],
)
def test_several_values_of_a_flag_are_written_with_commas(arguments, says, caught, refused):
    assert says in refused(*arguments.split())
    assert caught.recipe is None
