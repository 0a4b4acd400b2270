"""Triton's interpreter, without its waste of time."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

EXECUTOR: Any = interpreter.GridExecutor


def hasten(monkeypatch: Any) -> None:
    """For the time of a test. The interpreter remaps the whole language at each call of a function
    by a kernel, also of `tl.sum`; here it does so once a launch for the functions of a module."""
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
