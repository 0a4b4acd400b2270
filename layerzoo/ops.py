"""Op: the mathematics inside a layer, one signature, several implementations.

`recurrent` is the specification, `chunked` the portable PyTorch path, `triton` the performance
path, in `layerzoo.kernels.<op>`. A named implementation runs or raises; only `auto` chooses.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

IMPLS = ("auto", "recurrent", "chunked", "triton")


class ImplError(RuntimeError):
    """A named implementation that cannot run here; the message says why."""


class Op:
    """The implementations of one op, by name.

    A Triton kernel is a module `layerzoo.kernels.<kernel>`, by default of the op's name, with
    `run`, of the signature of the other implementations, and
    `supports(*args, **kwargs) -> str | None`, the reason why not.
    """

    def __init__(self, name: str, kernel: str | None = None) -> None:
        self.name, self.kernel = name, kernel or name
        self.impls: dict[str, Callable[..., Any]] = {}
        self.transformable = {"recurrent"}
        self.has_kernel = True  # until an import has shown otherwise: `auto` asks at each call
        self.used: set[str] = set()
        """The implementations that ran in this process, for the run record."""

    def register(
        self, impl: str, *, upcast: bool = True, transformable: bool = False
    ) -> Callable[[Any], Any]:
        """Decorator: add an implementation. With `upcast` it sees every floating-point tensor,
        also in tuples and dicts, in the accumulator's dtype, and runs with autocast off; its
        output returns to q's dtype. One that is `transformable`, as `recurrent` is always, runs
        inside torch.func: it writes out no backward of its own."""

        def add(fn: Callable[..., Any]) -> Callable[..., Any]:
            self.impls[impl] = _upcast(fn) if upcast else fn
            if transformable:
                self.transformable.add(impl)
            return fn

        return add

    def available(self) -> tuple[str, ...]:
        """The named implementations, with `triton` where a kernel file exists."""
        return (*self.impls, *(("triton",) if self._kernel()[0] else ()))

    def select(self, impl: str, *args: Any, **kwargs: Any) -> tuple[str, Callable[..., Any]]:
        """The implementation that `impl` means for these arguments, and its name.

        Raises:
            ImplError: the named implementation does not exist or does not support them.
        """
        if impl in self.impls:
            return impl, self.impls[impl]
        if impl not in ("auto", "triton"):
            known = ", ".join(("auto", *self.available()))
            raise ImplError(f"{self.name}: no impl '{impl}'; it has {known}")
        portable = "chunked" if "chunked" in self.impls else "recurrent"
        if impl == "auto" and not args[0].is_cuda:
            return portable, self.impls[portable]
        kernel, reason = self._kernel()
        if kernel is not None:
            reason = kernel.supports(*args, **kwargs)
            if reason is None:
                return "triton", kernel.run
        if impl == "auto":
            return portable, self.impls[portable]
        raise ImplError(f"{self.name}: impl 'triton' cannot run: {reason}")

    def __call__(self, impl: str, *args: Any, **kwargs: Any) -> Any:
        name, fn = self.select(impl, *args, **kwargs)
        # Asked while torch.compile traces, it would break a graph once more where `fn` does.
        if not is_compiling() and name not in self.transformable and transforming():
            raise ImplError(
                f"{self.name}: impl '{name}' cannot run inside torch.func (grad, vmap, jvp and "
                f"what is made of them); use impl 'recurrent'"
            )
        self.used.add(name)
        return fn(*args, **kwargs)

    def _kernel(self) -> tuple[Any, str]:
        """The kernel module, or None and the reason why."""
        module = f"layerzoo.kernels.{self.kernel}"
        if module in sys.modules:  # torch.compile traces this, and no import
            return sys.modules[module], ""
        if self.has_kernel:
            try:
                return importlib.import_module(module), ""
            except ModuleNotFoundError as error:
                if error.name == "triton":
                    return None, "triton is not installed"
                if error.name != module:
                    raise
                self.has_kernel = False
        return None, "it has no Triton kernel yet; use 'chunked' or 'auto'"


transforming = torch._C._are_functorch_transforms_active
"""Whether this runs inside a transform of torch.func."""


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward without a derivative of its own that says so. (torch's decorator of this name
    looks at the incoming gradient alone, and may leave terms out without a word.)"""

    @functools.wraps(backward)
    def run(*args: Any) -> Any:
        if torch.is_grad_enabled():
            raise ImplError(
                "impl 'chunked' has no second derivative (create_graph=True); use impl 'recurrent'"
            )
        return backward(*args)

    return run


def accumulator_dtype(*tensors: Any) -> torch.dtype:
    """float32, or float64 where any of the tensors is: what states and sums are kept in."""
    for t in tensors:
        if isinstance(t, Tensor) and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _upcast(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = accumulator_dtype(*args, *kwargs.values())

        def up(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.to(dtype) if x.is_floating_point() else x
            if isinstance(x, dict):
                return {name: up(value) for name, value in x.items()}
            return tuple(map(up, x)) if type(x) is tuple else x

        kind = args[0].device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            out = fn(*map(up, args), **{name: up(t) for name, t in kwargs.items()})
        if isinstance(out, tuple):
            return out[0].to(args[0].dtype), *out[1:]
        return out.to(args[0].dtype)

    return run


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[self.__name__.rpartition(".")[2]](*args, **kwargs)


def callable_module(module: ModuleType) -> None:
    """Let a module that has the name of its op be called as the op: their package has but one
    attribute for both. (torch.compile breaks a graph there; the op itself, imported
    from the module, it traces.)"""
    op = vars(module)[module.__name__.rpartition(".")[2]]
    module.__class__ = _CallableModule
    module.__signature__ = inspect.signature(op)  # pyright: ignore[reportAttributeAccessIssue]
