"""What is known of torch's flash attention on this processor."""

from __future__ import annotations

import functools

import torch


def prefers_blocks(dtype: torch.dtype) -> bool:
    """Return whether blocks of products are faster than torch's flash kernel.

    They are twice as fast in bfloat16 where AVX512 multiplies it, for the kernel's small products
    are slow there. Matrix units (AMX) suit the kernel better; elsewhere bfloat16 is emulated, and
    blocks take twenty times as long.
    """
    amx, avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    return dtype == torch.bfloat16 and avx512 and not amx


@functools.cache
def flash_shares_keys() -> bool:
    """Return whether torch's flash kernel takes fewer key heads than heads: younger ones do.

    Those that do not would read on behind the given heads, hence a view of enough of them here.
    """
    q, keys = torch.eye(4)[None, :, None], torch.eye(4)[None, :, None] + 1  # (1, 4, 1, 4)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    try:
        y, _ = flash(q, keys[:, :2], keys[:, :2])
    except RuntimeError:
        return False
    shared = keys[:, :2].repeat_interleave(2, 1)
    return torch.equal(y, flash(q, shared, shared)[0])
