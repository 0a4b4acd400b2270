"""What Triton's interpreter gets wrong of bfloat16, which it keeps as the bits: products and sums
of those, and roundings that carry. Patched, it computes as a GPU does."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

BUILDER: Any = interpreter.InterpreterBuilder
HANDLE: Any = interpreter.TensorHandle


def wide(x: Any) -> Any:
    """The numbers of a handle, in float32 if they are bfloat16."""
    return widened(x.data) if x.dtype.scalar == tl.bfloat16 else x.data


def widened(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x: Any) -> Any:
    """The bits of float32 numbers, rounded to the nearest, to even between two."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).reshape(x.shape)


def mend(monkeypatch: Any) -> None:
    """For the time of a test."""
    dot, binary, cast = BUILDER.create_dot, BUILDER.binary_op, BUILDER.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, d, *options)
        product = np.matmul(wide(a), wide(b)).astype(d.data.dtype)
        return HANDLE(product + d.data, d.dtype.scalar)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        if not a.dtype.scalar == b.dtype.scalar == tl.bfloat16:
            return binary(self, a, b, op)
        out = op(wide(a), wide(b))
        return HANDLE(out, tl.int1) if out.dtype == bool else HANDLE(rounded(out), tl.bfloat16)

    def cast_impl(self: Any, x: Any, to: Any) -> Any:
        kinds = x.dtype.scalar, to.scalar
        if kinds[0] == kinds[1] or tl.bfloat16 not in kinds:
            return cast(self, x, to)
        numbers = wide(x)
        if kinds[1] == tl.bfloat16:
            return HANDLE(rounded(numbers.astype(np.float32)), to.scalar)
        return HANDLE(numbers.astype(interpreter._get_np_dtype(to)), to.scalar)

    def get_bf16(self: Any, value: float) -> Any:
        return HANDLE(rounded(np.array([value], np.float32)), tl.bfloat16)

    for name, fixed in (
        ("create_dot", create_dot),
        ("binary_op", binary_op),
        ("cast_impl", cast_impl),
        ("create_fp_to_fp", lambda self, x, to, rounding: cast_impl(self, x, to)),
        ("get_bf16", get_bf16),
    ):
        monkeypatch.setattr(BUILDER, name, fixed, raising=False)
