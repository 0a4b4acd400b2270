"""Where kernels meet the machine: what it is, what a kernel may be given, and the launch itself.

Every kernel is launched by `launch` and writes into memory of `empty`, so that tests can poison
what is written to, and `compile.py` can compile for machines that are not here what would run.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

TRITON = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3])
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs the kernels on the CPU: slow, for tests."""


class Target(NamedTuple):
    """What kernels are built for. arch: 80, 90, .. or gfx942. shared: bytes a program may have."""

    backend: str
    arch: int | str
    multiprocessors: int
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 108, 166_912),
    "sm_90": Target("cuda", 90, 132, 232_448),
    "sm_100": Target("cuda", 100, 148, 232_448),
    "gfx942": Target("hip", "gfx942", 304, 65_536),
}
PRETENDED: list[Target] = []
"""The last one, if any, is used in place of the machine's own: in tests and by `compile.py`."""


def target(device: torch.device) -> Target:
    """What a kernel on this device is built for; in the interpreter a small GPU."""
    if PRETENDED:
        return PRETENDED[-1]
    if INTERPRETED:
        return Target("cuda", 90, 4, 232_448)
    return _target(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _target(index: int) -> Target:
    found: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = found.gcnArchName.split(":")[0]
        return Target("hip", arch, found.multi_processor_count, 65_536)
    arch = 10 * found.major + found.minor
    shared = found.shared_memory_per_block_optin
    return Target("cuda", arch, found.multi_processor_count, shared)


def refusal(*tensors: Tensor | None) -> str | None:
    """Why no kernel takes these tensors: the device, or the dtype."""
    for x in tensors:
        if x is None:
            continue
        if not (x.is_cuda or INTERPRETED or PRETENDED):
            return f"it needs a GPU, and the tensors are on {x.device}"
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            name = str(x.dtype).removeprefix("torch.")
            return f"it computes in float32, bfloat16 or float16, not in {name}"
    return None


def distrusted(what: str, *tensors: Tensor | None) -> str | None:
    """Why no gradient is taken here of what an H200 with Triton 3.6.0 got wrong, and Triton's
    interpreter gets right. (flash-linear-attention refuses its own gated backward there, too, for
    wrong products on Hopper before Triton 3.7.1.)"""
    on = target(next(x for x in tensors if x is not None).device)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if wanted and on[:2] == ("cuda", 90) and TRITON < (3, 7, 1) and not PRETENDED:
        return f"gradients {what} need Triton 3.7.1 or later on a Hopper GPU"
    return None


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of the matrix products: TF32 would lose half the digits of float32."""
    return "ieee" if dtype == torch.float32 else "tf32"


class Launch(NamedTuple):
    """A launch as it was asked for."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


POISON: list[float] = []
"""The last one, if any, fills what `empty` returns: what a kernel leaves unwritten shows."""
_RECORD: list[list[Launch]] = []


def empty(shape: Sequence[int], *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a kernel's output on the device of `like`, and of its dtype but for `dtype`."""
    x = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    return x.fill_(POISON[-1]) if POISON and x.is_floating_point() else x


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Run a kernel. args: tensors, numbers and None, in the kernel's order. constants: its
    constexpr arguments, by name. A grid of no programs is no launch."""
    if _RECORD:
        _RECORD[-1].append(Launch(kernel, args, constants, num_warps, num_stages))
        return
    if 0 in grid:
        return
    first = next(x for x in args if isinstance(x, Tensor))
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)


@contextmanager
def recorded(pretended: Target) -> Iterator[list[Launch]]:
    """Inside, kernels are not run, but listed as they would be launched on a target."""
    found: list[Launch] = []
    PRETENDED.append(pretended)
    _RECORD.append(found)
    try:
        yield found
    finally:
        _RECORD.pop()
        PRETENDED.pop()


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def pad_channels(x: Tensor, size: int) -> Tensor:
    """Zero channels at the end, up to `size`."""
    missing = size - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x
