"""Packages of the extras, which `make test-all` installs."""

from __future__ import annotations

from typing import Any

import pytest

EXTRAS = {
    "datasets": "eval",
    "huggingface_hub": "hf",
    "lm_eval": "eval",
    "pyarrow": "eval",
    "ray": "ray",
    "tokenizers": "hf",
}


def need(module: str) -> Any:
    """The module; without it the test is skipped."""
    reason = f"{module} is of the {EXTRAS[module]} extra: make test-all"
    return pytest.importorskip(module, reason=reason)
