"""What follows from a machine's facts and figures."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from veneer.doctor.advice import remarks
from veneer.doctor.facts import Facts
from veneer.doctor.measure import Card, Figures, Speed
from veneer.machine import Cores, Processor
from veneer.models import dtype

OLD = Processor("an older one", ("AVX2", "AVX512"))
NEW = Processor("a newer one", ("AVX2", "AVX512", "AMX-BF16"))
FACTS = Facts(
    system="Linux",
    processor=OLD,
    cores=Cores(4, 4, None),
    load=0.1,
    memory=8 * 10**9,
    free=6 * 10**9,
    place=Path("/work"),
    disk_free=10**11,
    driver=False,
    versions={},
    missing={},
    environment={},
)
FIGURES = Figures(
    threads=4,
    products=Speed(100e9, 20e9),
    dtype="float32",
    copied=10e9,
    read=2e9,
    written=1e9,
    compiler="g++",
    native="",
    cuda=False,
    card=None,
)
CARD = Card("a card", 10**10, Speed(20e12, 400e12), 10e9, "")


def texts(kind, facts=FACTS, **figures):
    every = remarks(facts, replace(FIGURES, **figures))
    return " ".join(remark.text for remark in every if remark.kind == kind)


@pytest.mark.parametrize(
    ("processor", "products", "kind", "advice"),
    [
        (OLD, Speed(100e9, 20e9), "slow", "auto, which takes float32"),
        (NEW, Speed(100e9, 700e9), "fast", "auto, which takes bf16"),
        (NEW, Speed(100e9, 102e9), "fast", "Take --dtype bf16"),
    ],
)
def test_the_dtype_to_take_is_the_faster_one_and_the_smaller_where_both_are_alike(
    processor, products, kind, advice
):
    facts = replace(FACTS, processor=processor)
    assert "bf16 products" in texts(kind, facts, products=products)
    assert advice in texts("do", facts, products=products)


@pytest.mark.parametrize(("slow", "fast"), [("bf16", "float32"), ("float32", "bf16")])
def test_the_advice_is_what_auto_does(slow, fast, monkeypatch):
    seconds = {dtype.NAMES[slow]: 3.0, dtype.NAMES[fast]: 1.0}
    monkeypatch.setattr(dtype, "product_seconds", lambda *_, **__: seconds)
    assert dtype.fastest_dtype() == dtype.NAMES[fast]
    speed = Speed(1 / seconds[torch.float32], 1 / seconds[torch.bfloat16])
    assert f"auto, which takes {fast}" in texts("do", products=speed)


@pytest.mark.parametrize(
    ("cores", "threads", "says"),
    [
        (Cores(64, 64, 4.0), 64, "OMP_NUM_THREADS=4"),
        (Cores(64, 64, 2.5), 64, "OMP_NUM_THREADS=2"),
        (Cores(64, 64, 0.5), 64, "OMP_NUM_THREADS=1"),
        (Cores(4, 4, None), 2, "takes 2 of 4 cores"),
        (Cores(4, 4, None), 8, "OMP_NUM_THREADS=4"),
    ],
)
def test_threads_are_as_many_as_cores_are_given(cores, threads, says):
    assert says in texts("do", replace(FACTS, cores=cores), threads=threads)


def test_where_all_cores_are_used_nothing_is_said_of_threads():
    for cores, threads in ((Cores(4, 4, None), 4), (Cores(8, 4, None), 4), (Cores(8, 8, 4.0), 4)):
        assert "OMP_NUM_THREADS" not in texts("do", replace(FACTS, cores=cores), threads=threads)


def test_a_card_that_torch_does_not_use_is_what_to_mend():
    driver = replace(FACTS, driver=True)
    assert "build for CUDA" in texts("do", driver)
    assert "nvidia-smi" in texts("do", driver, cuda=True)
    assert "No GPU" in texts("slow")
    used = {"cuda": True, "card": CARD, "dtype": "bfloat16"}
    assert "4,000 times as fast" in texts("fast", driver, **used)
    assert "float32" not in texts("do", driver, **used)  # it is of the processor
    slower = replace(CARD, slower="no kernels in Triton")
    assert "veneer[gpu]" in texts("do", driver, **{**used, "card": slower})


@pytest.mark.parametrize(
    ("facts", "figures", "kind", "says"),
    [
        ({}, {"native": "no C++ compiler was found", "compiler": ""}, "do", "g++"),
        ({}, {"native": "no OpenMP"}, "slow", "no OpenMP"),
        ({"load": 3.9}, {}, "slow", "Other programs compute"),
        ({}, {"written": None, "read": None}, "do", "--out elsewhere"),
        ({"disk_free": 10**9}, {}, "do", "1.0 GB of disk"),
        ({}, {"read": 1e8}, "slow", "10.0 s"),
        ({"environment": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}, {}, "do", "Unset ONEDNN_MAX_CPU_ISA"),
    ],
)
def test_each_hindrance_is_named(facts, figures, kind, says):
    assert says in texts(kind, replace(FACTS, **facts), **figures)
    assert says not in texts(kind)
