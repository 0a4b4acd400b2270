"""The kernels' judge. Without a GPU they run in Triton's interpreter, on the CPU; with one the
same tests run there, at larger sizes and in bfloat16 too."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from layerzoo.kernels import launch
from layerzoo.memories.common.chunks import unit_lower_inverse
from layerzoo.memories.delta import chunked as delta
from layerzoo.ops import Op
from layerzoo.testing.precision import DRAWS, check_precision, errors, ratios

from . import bfloat16, interpreter

GPU = torch.cuda.is_available()
HERE = Path(__file__).parent

DISTRUSTED = launch.distrusted
DTYPES = [torch.float32, torch.bfloat16]
OTHERS = [] if GPU else [pytest.mark.slow]
"""Marks of cases beside the first, which the interpreter takes seconds for."""
Tensors = dict[str, Any]


KEPT = 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the interpreter, which takes seconds, a quarter of each test's cases in bfloat16 are
    run by default, and the others are slow tests. All cases are run in float32, whose paths are
    the same."""
    met = Counter[str]()
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if GPU or params.get("dtype") != torch.bfloat16 or item.path.parent != HERE:
            continue
        name = item.nodeid.partition("[")[0]
        if met[name] % KEPT:
            item.add_marker(pytest.mark.slow)
        met[name] += 1


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _kernels_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whichever version in the interpreter, whose bfloat16 is made that of a GPU. On a GPU that
    is not trusted with a gradient it is not run: it would take the process down with it."""
    if GPU:
        monkeypatch.setattr(launch, "distrusted", lambda *args: skip(DISTRUSTED(*args)))
    else:
        monkeypatch.setattr(launch, "TRITON", (99,))
        bfloat16.mend(monkeypatch)
        interpreter.hasten(monkeypatch)


def skip(reason: str | None) -> None:
    if reason:
        pytest.skip(reason)


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that kernels write to holds NaN before."""
    launch.POISON.append(float("nan"))
    yield
    launch.POISON.pop()


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter: each access of a kernel lies within one of the tensors it is given."""
    if GPU:
        return
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    builder: Any = InterpreterBuilder
    executor: Any = GridExecutor
    begin, load, store = (
        executor._init_args_hst,
        builder.create_masked_load,
        builder.create_masked_store,
    )
    spans: list[tuple[int, int]] = []

    def begun(self: Any, *args: Any) -> Any:
        found = begin(self, *args)
        tensors = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        ends = (x.untyped_storage().data_ptr() + x.untyped_storage().nbytes() for x in tensors)
        spans[:] = [(x.data_ptr(), end) for x, end in zip(tensors, ends, strict=True)]
        return found

    def check_access(pointers: Any, mask: Any) -> None:
        at = pointers.data[mask.data.astype(bool)]
        if at.size:
            size = pointers.get_element_ty().primitive_bitwidth // 8
            first, end = int(at.min()), int(at.max()) + size
            assert any(a <= first and end <= b for a, b in spans), "outside of all tensors"

    def checked(access: Any, mask: int) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            check_access(args[0], args[mask])
            return access(self, *args, **kwargs)

        return run

    monkeypatch.setattr(executor, "_init_args_hst", begun)
    monkeypatch.setattr(builder, "create_masked_load", checked(load, 1))
    monkeypatch.setattr(builder, "create_masked_store", checked(store, 2))


@pytest.fixture
def solves_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has no triangular solve in 16 bits."""

    def solve(A: Tensor) -> Tensor:
        low = A.element_size() == 2
        return unit_lower_inverse(A.float()).to(A.dtype) if low else unit_lower_inverse(A)

    monkeypatch.setattr(delta, "unit_lower_inverse", solve)


@pytest.fixture
def judge(
    poison: None, inside: None, device: torch.device, dtype: torch.dtype
) -> Callable[..., None]:
    def run(op: Op, call: Callable[..., Any], tensors: Tensors, **options: Any) -> None:
        judgement = Judgement(op, call, tensors, device, dtype, **options)
        judgement.check(judgement.run("triton"))

    return run


class Judgement:
    """Of an impl, by the rule of tests/precision.py, for every output and gradient. Exact is
    `recurrent` in float64, and the reference eager `chunked` in the dtype that is judged."""

    def __init__(
        self,
        op: Op,
        call: Callable[..., Any],
        tensors: Tensors,
        device: torch.device,
        dtype: torch.dtype,
        wide: tuple[str, ...] = (),
        grad: bool = True,
    ) -> None:
        """call: of an impl and of the tensors by name, returns a pytree. tensors: float64
        tensors, or pytrees of them. wide: those that stay float32 where dtype is lower (states,
        gates). grad: compare the gradients of all of them, too."""
        self.op, self.call, self.dtype, self.grad = op, call, dtype, grad

        def cast(name: str, x: Any) -> Any:
            keep = torch.float32 if name in wide else dtype  # of the same values in any case
            return floats(lambda t: t.to(device, dtype).to(keep), x)

        self.given = {name: cast(name, x) for name, x in tensors.items()}
        leaves = (x for x in tree_leaves(self.given) if isinstance(x, Tensor))
        self.terms = max(max(x.shape, default=1) for x in leaves)
        self.want = self.run("recurrent", widened(self.given))
        self.reference = [errors(self._lowered(self.given), self.want)]
        for draw in range(1, DRAWS):
            given = {name: cast(name, x) for name, x in rescaled(tensors, draw).items()}
            exact = self.run("chunked", widened(given))  # which is `recurrent`, and faster
            self.reference.append(errors(self._lowered(given), exact))

    def run(self, impl: str, given: Tensors | None = None) -> dict[str, Tensor]:
        return outcome(self.call, impl, given or self.given, self.grad)

    def ratios(self, made: dict[str, Tensor]) -> dict[str, float]:
        return ratios([errors(made, self.want)], self.reference, self.terms)

    def check(self, made: dict[str, Tensor]) -> None:
        check_precision([errors(made, self.want)], self.reference, self.terms)

    def _lowered(self, given: Tensors) -> dict[str, Tensor]:
        if self.dtype == torch.float32:
            return self.run("chunked", given)
        chunked = self.op.impls["chunked"]
        self.op.impls["chunked"] = lowered(chunked, self.dtype)
        try:
            return self.run("chunked", given)
        finally:
            self.op.impls["chunked"] = chunked


def floats(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return tree_map(
        lambda x: fn(x) if isinstance(x, Tensor) and x.is_floating_point() else x, tree
    )


def widened(tree: Any) -> Any:
    return floats(Tensor.double, tree)


def rescaled(tensors: Tensors, seed: int) -> Tensors:
    """Every tensor, up to 1 / 64 smaller: the same problem, and other roundings. Keys that were
    equal stay so, and none becomes longer than 1."""
    generator = torch.Generator().manual_seed(seed)
    return floats(lambda t: t * (1 - float(torch.rand((), generator=generator)) / 64), tensors)


def lowered(chunked: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """`chunked` as written, without its cast to float32, and with all tensors of this dtype."""
    raw = inspect.unwrap(chunked)

    def run(*args: Any, **kwargs: Any) -> Any:
        def lower(x: Any) -> Any:
            return floats(lambda t: t.to(dtype), x)

        return raw(*lower(args), **lower(kwargs))

    return run


def outcome(
    call: Callable[..., Any], impl: str, tensors: Tensors, grad: bool
) -> dict[str, Tensor]:
    """Outputs and gradients by name; the loss weighs every entry of every output differently."""
    names, leaves = [], []

    def leaf(name: str, x: Any) -> Any:
        def one(t: Tensor) -> Tensor:
            if not (grad and t.is_floating_point()):
                return t
            names.append(f"gradient of {name} {len(names)}")
            leaves.append(t.detach().clone().requires_grad_())
            return leaves[-1]

        return tree_map(one, x)

    out = call(impl, **{name: leaf(name, x) for name, x in tensors.items()})
    found = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]
    result = {f"output {n}": x.detach() for n, x in enumerate(found)}
    if grad:
        generator = torch.Generator().manual_seed(0)
        weights = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in found)
        # Weights of the lowest dtype: the references would see others than the kernel does.
        loss = sum(
            (x.double() * w.bfloat16().double().to(x.device)).sum()
            for x, w in zip(found, weights, strict=True)
        )
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
        result |= dict(zip(names, grads, strict=True))
    return result
