"""Compile launches for GPUs that need not be here, and say what each takes of one.

`layerzoo bench compile` lists launches by `launch.recorded`, so that what is compiled is what
would be launched.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch, Target

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
TENSOR_CORES = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma"


class Resources(NamedTuple):
    """What a compiled kernel takes. types: of its arguments, the constants among them. registers:
    of a thread. spilled: bytes of a thread. shared: bytes of a program. tensor_cores: their
    instructions in the code, by name."""

    name: str
    types: str
    registers: int
    spilled: int
    shared: int
    tensor_cores: dict[str, int]


def source(launch: Launch) -> ASTSource:
    """The kernel with the types of its arguments, as a launch would specialise it."""
    names = launch.kernel.arg_names
    values = {**dict(zip(names, launch.args, strict=False)), **launch.constants}
    free = {p.name for p in launch.kernel.params if p.do_not_specialize}
    signature, constants, attributes = {}, {}, {}
    for n, name in enumerate(names):
        value = values[name]
        kind = kind_of(value)
        one = type(value) is int and value == 1 and name not in free
        if name in launch.constants or kind is None or one:
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = kind
        aligned = isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)
        if aligned and name not in free:
            attributes[(n,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def kind_of(value: Any) -> str | None:
    """Triton's name of an argument's type; None for what is compiled in."""
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    return "fp32" if isinstance(value, float) else None


def compiled(launch: Launch, target: Target) -> Resources:
    """Compile one launch for a target.

    Raises:
        whatever Triton does when it cannot.
    """
    gpu = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    given = source(launch)
    found: Any = triton.compile(given, target=gpu, options=options)
    text = found.asm["amdgcn"] if target.backend == "hip" else found.asm["ptx"]
    cores: dict[str, int] = {}
    for word in re.findall(TENSOR_CORES, text):
        cores[word] = cores.get(word, 0) + 1
    registers, spilled = amd(text) if target.backend == "hip" else nvidia(found.asm["cubin"])
    types = {
        name: given.constants.get((n,), kind)
        for n, (name, kind) in enumerate(given.signature.items())
    }
    text = " ".join(f"{name}={value}" for name, value in {**types, **options}.items())
    return Resources(
        launch.kernel.__name__, text, registers, spilled, found.metadata.shared, cores
    )


def amd(text: str) -> tuple[int, int]:
    """(VGPRs, spilled bytes) of an assembly."""
    count, spills = (
        int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])
        for name in ("vgpr_count", "vgpr_spill_count")
    )
    return count, 4 * spills


def nvidia(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a cubin: what does not fit in registers is on the stack."""
    from triton.backends import nvidia

    tool = Path(str(nvidia.__file__)).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (
        int(re.findall(rf"{name}:(\d+)", listing)[-1]) for name in ("REG", "STACK")
    )
    return registers, stack
