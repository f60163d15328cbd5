"""Which way computes an operation: pure functions of the device, the dtype, the shape and what is
installed.

Each way has its formula in torch beside it. Where nothing faster is there the formula computes, and
`slower_on` has the sentence that says so.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

AttentionWay = Literal["native", "varlen", "flex", "groups", "blocks"]
ElementwiseWay = Literal["native", "triton", "torch"]
NormWay = Literal["native", "liger", "layer_norm", "torch"]
ExpertsWay = Literal["grouped", "loop"]
MixedWay = Literal["triton", "torch"]

HALVES = (torch.float16, torch.bfloat16)
AMPERE = (8, 0)
GROUPED = (9, 10)  # Hopper and Blackwell for data centres, by the major number of their capability
# The largest head of torch's flash kernels (sdp_utils.cpp), and of FlexAttention's on most cards.
LARGEST_HEAD = 256
ALIGNED = 8  # numbers of 16 bits in the 16 bytes to which grouped products want rows aligned


@dataclass(frozen=True)
class Device:
    """What choices depend on of a device.

    capability: of an NVIDIA card, (0, 0) for others. flash: whether this torch has flash kernels
    for the card. triton, liger: whether these libraries are installed.
    """

    type: str
    capability: tuple[int, int] = (0, 0)
    flash: bool = False
    triton: bool = False
    liger: bool = False


@functools.cache
def device_of(device: torch.device) -> Device:
    """Return what choices depend on of a device of this machine."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return Device(device.type)
    return Device(
        device.type,
        torch.cuda.get_device_capability(device),
        flash=torch.backends.cuda.is_flash_attention_available(),
        triton=find_spec("triton") is not None,
        liger=_has_liger(),
    )


def attention(
    device: Device,
    dtype: torch.dtype,
    largest_head: int,
    *,
    softcap: bool = False,
    dropout: bool = False,
    other_keys: bool = False,
) -> AttentionWay:
    """Return the way of attention over packed rows.

    native: the CPU's kernels. varlen: flash attention that takes the rows as they lie, with windows
    and sinks. flex: compiled FlexAttention, which can cap scores. groups: SDPA over padded groups
    of like length, or products where the softmax is another. blocks: products of blocks, whose
    masks of dropout can be made again. largest_head: of a query, key or value. other_keys: whether
    rows see keys that are not their own, as those of a prefix or of other processes.
    """
    if device.type == "cpu":
        return "native"
    if dropout:
        return "blocks"
    fits = device.capability >= AMPERE and dtype in HALVES and largest_head <= LARGEST_HEAD
    if fits and not other_keys:
        if device.flash and not softcap:
            return "varlen"
        if device.triton and softcap:
            return "flex"
    return "groups"


def elementwise(device: Device, *dtypes: torch.dtype) -> ElementwiseWay:
    """Return the way of activations, rotation, gains and the loss, for tensors of these dtypes."""
    if device.type == "cpu":
        return "native"
    return "triton" if _has_triton(device, *dtypes) else "torch"


def norm(device: Device, dtype: torch.dtype, *, centred: bool, plain: bool) -> NormWay:
    """Return the way of a norm. plain: a weight of x's dtype, without a bias where it is an
    RMSNorm, and without an offset or a rounding before the weight where it is a LayerNorm."""
    if device.type == "cpu":
        return "native"
    if plain and centred:
        return "layer_norm"
    return "liger" if plain and device.liger and _has_triton(device, dtype) else "torch"


def experts(device: Device, dtype: torch.dtype, *widths: int, quantized: bool) -> ExpertsWay:
    """Return the way of a mixture's experts, whose stacks are so wide on either side.

    grouped: one product for all experts of a stack, whose sizes stay on the card. Elsewhere torch's
    grouped product asks the card for them and loops itself (GroupedBlas.cpp), so that expert by
    expert is no slower; only there can a quantized stack be dequantized in pieces.
    """
    aligned = all(width % ALIGNED == 0 for width in widths)
    fast = device.capability[0] in GROUPED and dtype == torch.bfloat16
    return "grouped" if fast and aligned and not quantized else "loop"


def mixed(device: Device, *dtypes: torch.dtype) -> MixedWay:
    """Return the way of rows with adapters of their own: one kernel, which finds each row's factors
    by their addresses, or torch's products."""
    return "triton" if device.type != "cpu" and _has_triton(device, *dtypes) else "torch"


def slower_on(device: Device) -> str:
    """Return what a person should know of the faster ways that are not there, or ""."""
    if device.type != "cuda" or device.capability < AMPERE:
        return ""
    missing = [
        name
        for name, there in (("triton", device.triton), ("liger-kernel", device.liger))
        if not there
    ]
    if not missing:
        return "" if device.flash else "this torch has no flash attention for the card"
    return f"{' and '.join(missing)} would be faster here (pip install 'veneer[gpu]')"


def uses_triton(*tensors: Tensor | None) -> bool:
    """Return whether the elementwise kernels in Triton take these tensors, of one device."""
    own = [tensor for tensor in tensors if tensor is not None]
    return elementwise(device_of(own[0].device), *(x.dtype for x in own)) == "triton"


def slower_experts_on(device: Device, dtype: torch.dtype, *, quantized: bool) -> str:
    """Return what a person should know of a mixture's experts on a device, or ""."""
    if device.type != "cuda" or experts(device, dtype, quantized=quantized) == "grouped":
        return ""
    return (
        "Experts are computed one after the other, and each mixture waits for the card to say how "
        "many rows they have: grouped products want experts that are not quantized, in bf16, on "
        "Hopper or Blackwell for data centres"
    )


def _has_liger() -> bool:
    """Return whether Liger is here in a version whose functions, which are its own affair, are
    those that `liger_norm` calls."""
    if find_spec("liger_kernel") is None:
        return False
    return version("liger_kernel").startswith("0.8.")


def _has_triton(device: Device, *dtypes: torch.dtype) -> bool:
    return (
        device.triton
        and device.capability >= AMPERE
        and all(dtype in (*HALVES, torch.float32) for dtype in dtypes)
    )
