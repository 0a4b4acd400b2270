"""The laws of layerzoo.testing, for every registered layer, case and implementation.

A new layer is tested without an edit here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from layerzoo.registry import get_layer
from layerzoo.testing import Check, layer_checks
from layerzoo.testing.arithmetic_laws import wrong
from layerzoo.testing.cases import LayerCase
from layerzoo.testing.precision import DRAWS, ratios
from layerzoo.testing.sequence_laws import LAWS as SEQUENCE_LAWS

from .arithmetic import FAULTS, Arithmetic, to_bfloat16


@pytest.fixture(autouse=True)
def _warn_always() -> Iterator[None]:
    """Warnings are errors, also those that torch gives once a process: otherwise only the first
    test that meets one would fail."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


JUDGED = {"delta_rule": "kda", "fast_weights": "allmem", "linear_attention": "gla"}
"""Of an op with several layers, the one whose case takes most of its paths."""


def marked(check: Check) -> Any:
    """What takes seconds is done by default for one layer of an op, and low precision for one of
    the compositions, whose own arithmetic is a sum. Of cases after the first, `chunked` alone
    keeps the laws of sequences by default: it is the function of `recurrent`."""
    (name, n, impl), law = check.case, check.law.name
    is_slow = law in ("compiles", "precision") and get_layer(name).kind == "composition"
    is_slow |= law == "precision" and name != JUDGED.get(check.case.op, name)
    is_slow &= (name, law) != ("parallel", "precision")
    is_slow |= n > 0 and impl == "recurrent" and check.law in SEQUENCE_LAWS
    return pytest.param(check, id=str(check), marks=[pytest.mark.slow] * is_slow)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
@pytest.mark.parametrize("check", [*map(marked, layer_checks())])
def test_law(check: Check) -> None:
    check()


@pytest.mark.parametrize("name", ["linear", "gated_delta", "sliding"])
def test_precision_sees_faults_of_an_op(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are planted in `chunked` alone, and not in projections."""
    case = LayerCase(name, 0, "chunked")
    (op,) = case.build().ops()
    chunked = op.impls["chunked"]
    reference = [wrong(case._replace(impl="recurrent"), "float32", n) for n in range(DRAWS)]

    def share(plant: Callable[..., Any]) -> float:
        monkeypatch.setitem(op.impls, "chunked", plant)
        return max(ratios([wrong(case, "float32", 0)], reference).values())

    def computed(arithmetic: Arithmetic) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with sdpa_kernel(SDPBackend.MATH), arithmetic:
                return chunked(*args, **kwargs)

        return run

    def forgotten(*args: Any, state: Any = None, **kwargs: Any) -> Any:
        low = tree_map(lambda x: to_bfloat16(x) if x.is_floating_point() else x, state)
        return chunked(*args, state=low, **kwargs)

    shares = {name: share(computed(fault)) for name, fault in FAULTS.items()}
    if case.name != "sliding":  # whose cache is as the keys are
        shares["upcast of the state"] = share(forgotten)
    assert share(chunked) < 0.75
    assert min(shares.values()) > 30, shares
