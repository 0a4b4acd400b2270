"""Triton's interpreter, without its waste of time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from triton.language import core
from triton.runtime import interpreter

EXECUTOR: Any = interpreter.GridExecutor
BUILDER: Any = interpreter.interpreter_builder


def hasten(monkeypatch: Any) -> None:
    """For the time of a test. No result changes."""
    remap_once_a_launch(monkeypatch)
    keep_types(monkeypatch)
    # As a kernel runs on a GPU. The interpreter would do every sum of integers again in 64 bits.
    options = replace(BUILDER.options, sanitize_overflow=False)
    monkeypatch.setattr(BUILDER, "options", options)


def remap_once_a_launch(monkeypatch: Any) -> None:
    """The interpreter remaps the whole language at each call of a function by a kernel, also of
    `tl.sum`; here it does so once a launch for the functions of a module."""
    remap, launch = interpreter._patch_lang, EXECUTOR.__call__
    done: set[int] = set()  # the modules, by the ids of their globals

    def once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module in done:
            return None  # which only a launch itself would read
        done.add(module)
        return remap(fn)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter, "_patch_lang", once)
    monkeypatch.setattr(EXECUTOR, "__call__", launched)


def keep_types(monkeypatch: Any) -> None:
    """Each operation makes its result's type anew, with the tuples of its shape, and looks for
    numpy's type in a table that it makes anew. Here what is equal is made once."""
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    find = interpreter._get_np_dtype
    types: dict[Any, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(self.__dict__)
        self.__dict__.update(types[key])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            make_tensor(self, None, type)
            tensors[type.name] = dict(self.__dict__)
        self.__dict__.update(tensors[type.name], handle=handle)

    def find_once(of: Any) -> Any:
        key = of.scalar.name
        if key not in found:
            found[key] = find(of)
        return found[key]

    monkeypatch.setattr(core.block_type, "__init__", init_type)
    monkeypatch.setattr(core.tensor, "__init__", init_tensor)
    monkeypatch.setattr(interpreter, "_get_np_dtype", find_once)
