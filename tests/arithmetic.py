"""Arithmetic other than this machine's, for what a test runs: faults to plant, and the sums of
other machines, which are as good as its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

Round = Callable[[Tensor], Tensor]
Product = Callable[[Tensor, Tensor], Tensor]

LOW = (torch.float32, torch.bfloat16, torch.float16)
SUMS = ("sum", "cumsum", "mean")
ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math")


class Arithmetic(TorchDispatchMode):
    """product: in place of each product of matrices. total: of each sum, and of each product, as
    it is returned. Both where the dtype is lower than float64, so that references stay exact."""

    def __init__(self, product: Product = torch.matmul, total: Round | None = None) -> None:
        super().__init__()
        self.product, self.total = product, total or (lambda x: x)
        self.met: set[str] = set()
        """The operators that were other than the machine's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        kind = name.rstrip("_")
        tensors = [x for x in args if isinstance(x, Tensor)]
        if tensors and tensors[-1].dtype in LOW:
            if kind in ("mm", "bmm", "addmm", "baddbmm"):
                self.met.add(kind)
                return self._multiply(name, args, **kwargs)
            if kind in SUMS:
                self.met.add(kind)
                return tree_map(self._rounded, func(*args, **kwargs))
        return func(*args, **kwargs)

    def _rounded(self, x: Any) -> Any:
        return x.copy_(self.total(x)) if isinstance(x, Tensor) else x

    def _multiply(
        self, name: str, args: Any, *, beta: float = 1, alpha: float = 1, out: Any = None
    ) -> Tensor:
        found = self.product(*args[-2:])
        if len(args) == 3:
            found = beta * args[0] + alpha * found if beta else alpha * found
        out = args[0] if name.endswith("_") else out
        found = self.total(found).to(args[-1].dtype)
        return found if out is None else out.copy_(found)


def to_tf32(x: Tensor) -> Tensor:
    """float32 with 10 bits of mantissa, as tensor cores read it."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def to_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def to_float8(x: Tensor) -> Tensor:
    """3 bits of mantissa, in the range of float32."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x80000) & ~0xFFFFF).view(torch.float32).to(x.dtype)


def to_float16(x: Tensor) -> Tensor:
    return x.half().to(x.dtype)


def operands(rounded: Round) -> Product:
    """A product whose operands are rounded."""
    return lambda a, b: rounded(a).to(a.dtype) @ rounded(b).to(b.dtype)


def blocks(size: int) -> Product:
    """The terms of a product are added in blocks, and these one after the other."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        parts = zip(a.split(size, -1), b.split(size, -2), strict=True)
        return sum((x @ y for x, y in parts), a.new_zeros(()))

    return product


def reversed_terms(a: Tensor, b: Tensor) -> Tensor:
    return a.flip(-1) @ b.flip(-2)


def rounded_once(a: Tensor, b: Tensor) -> Tensor:
    """The product of float64, rounded."""
    return (a.double() @ b.double()).to(a.dtype)


def accumulated(rounded: Round, size: int = 1) -> Product:
    """The running sum is rounded after each block of terms."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(())
        for x, y in zip(a.split(size, -1), b.split(size, -2), strict=True):
            total = rounded(total + x @ y)
        return total

    return product


REARRANGED: dict[str, Product] = {
    "as they are": torch.matmul,
    "one after the other": blocks(1),
    "blocks of 4": blocks(4),
    "blocks of 16": blocks(16),
    "backwards": reversed_terms,
    "rounded once": rounded_once,
}
"""Sums of products as other machines may add them."""
FAULTS = {
    "products in TF32": Arithmetic(operands(to_tf32)),
    "products in bfloat16": Arithmetic(operands(to_bfloat16)),
    "sums returned in bfloat16": Arithmetic(total=to_bfloat16),
    "sums returned in float16": Arithmetic(total=to_float16),
    "sums in bfloat16": Arithmetic(accumulated(to_bfloat16)),
}
