"""Compiles every kernel in Triton to the machine code of cards, of which none has to be there.

A program of its own: where kernels are interpreted there is nothing to compile. It prints the
kernels' names and the bytes of their code as JSON.
"""

import json
import sys
from typing import Any, get_args

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from veneer.kernels import (
    triton_activation,
    triton_cross_entropy,
    triton_dropout,
    triton_gain,
    triton_mixed,
    triton_rotary,
    triton_rows,
)
from veneer.kernels.activation import Activation

OF_TRUTHS = (False, True)
GATES = [
    {"kind": kind, "is_gated": is_gated, "block": 1024}
    for kind in get_args(Activation)
    for is_gated in OF_TRUTHS
]
OWN = {"numbers": "*i64", "addresses": "*i64", "ranks": "*i64"}
BLOCKS = {"block_tokens": 16, "block_ranks": 16, "block_columns": 128}
# Of each kernel the parameters that are neither the tensors' pointers nor int32, and constants.
KERNELS: list[tuple[Any, str, dict[str, str], list[dict[str, Any]]]] = [
    (triton_activation._forward, "gate up y", {}, GATES),
    (triton_activation._backward, "dy gate up d_gate d_up y", {}, GATES),
    (
        triton_rotary._rotate,
        "x cos sin out",
        {"sign": "fp32"},
        [
            {
                "interleaved": interleaved,
                "block_heads": 4,
                "block_pairs": 64,
                "block_rest": 16,
                "copies_rest": copies_rest,
            }
            for interleaved in OF_TRUTHS
            for copies_rest in OF_TRUTHS
        ],
    ),
    (
        triton_cross_entropy._cross_entropy,
        "z out",
        {"targets": "*i64", "losses": "*fp32", "scale": "fp32", "softcap": "fp32"},
        [{"is_capped": is_capped, "block": 4096} for is_capped in OF_TRUTHS],
    ),
    (
        triton_dropout._drop,
        "x y",
        {"seeds": "*i64"},
        [{"adds": adds, "block": 1024} for adds in OF_TRUTHS],
    ),
    (
        triton_gain._add_with_gain,
        "y h B bias",
        {"gain": "*fp32"},
        [
            {"has_bias": has_bias, "block_tokens": 64, "block_columns": 64, "block_ranks": 16}
            for has_bias in OF_TRUTHS
        ],
    ),
    (triton_rows._sum, "rows weights sums", {"places": "*i64"}, [{"block": 1024}]),
    (triton_mixed._project, "x h", OWN, [BLOCKS]),
    (triton_mixed._add, "h y", OWN, [{"is_transposed": t, **BLOCKS} for t in OF_TRUTHS]),
]


def main(capability: int, dtype: str) -> None:
    sizes = {}
    for kernel, pointers, others, every in KERNELS:
        for constants in every:
            types = dict.fromkeys(pointers.split(), f"*{dtype}") | others
            names = [parameter.name for parameter in kernel.params]
            assert {*types, *constants} <= {*names}, kernel.__name__
            signature = {
                name: "constexpr" if name in constants else types.get(name, "i32") for name in names
            }
            source = ASTSource(kernel, signature, constexprs=constants)
            code = compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
            sizes[f"{kernel.__module__}.{kernel.__name__} {constants}"] = len(code)
    print(json.dumps(sizes))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
