"""Fast weights: networks trained while they read. `update: token` is in token.py, and `chunk` in
chunk.py; the op chooses by the rule."""

from __future__ import annotations

import importlib
from typing import Any


def _module(rule: Any) -> Any:
    name = "layerzoo.kernels.fast_weights." + rule.update
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None


def supports(*args: Any, **kwargs: Any) -> str | None:
    """Why the kernels cannot, or None."""
    module = _module(kwargs["rule"])
    if module is None:
        return "it has no kernel for update 'chunk' yet"
    return getattr(module, "supports_" + kwargs["rule"].update)(*args, **kwargs)


def run(*args: Any, **kwargs: Any) -> Any:
    """See `memories.fast_weights.engine.run`."""
    return getattr(_module(kwargs["rule"]), "run_" + kwargs["rule"].update)(*args, **kwargs)
