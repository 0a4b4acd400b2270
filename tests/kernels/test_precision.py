"""What the judge of kernels sees and what it lets pass, shown with the portable form in the
place of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerzoo.attention.sliding import rule as sliding
from layerzoo.memories.delta import rule as delta
from layerzoo.memories.fast_weights import Rule
from layerzoo.memories.fast_weights import op as fast_weights
from layerzoo.memories.linear import rule as linear
from layerzoo.ops import Op

from ..arithmetic import FAULTS, REARRANGED, Arithmetic, operands, to_bfloat16, to_float8
from . import test_chunk_update, test_delta, test_fast_weights, test_linear, test_sliding
from .conftest import Judgement, floats

pytestmark = pytest.mark.usefixtures("solves_in_float32")


class Family(NamedTuple):
    """Of kernels, by what the judge takes."""

    op: Op
    call: Callable[..., Any]
    tensors: dict[str, Any]
    wide: tuple[str, ...] = ()


def linear_of(decay: str) -> Family:
    given = test_linear.tensors((1, 150, 2, 16, 16), decay)
    return Family(linear.OP, test_linear.call(), given, test_linear.WIDE)


def delta_of(decay: str) -> Family:
    given = test_delta.arguments(1, 75, 2, 16, 32, decay)
    return Family(delta.OP, test_delta.call, given, test_delta.WIDE)


def sliding_with_sinks() -> Family:
    return Family(sliding.OP, test_sliding.attend(33, 4), test_sliding.tensors(T=90))


def fast_weights_of_tokens() -> Family:
    problem = test_fast_weights.Problem("biased", 20, C=8, V=23, row=True, B=4)
    return Family(fast_weights.OP, problem, problem.tensors, test_fast_weights.WIDE)


def fast_weights_of_chunks() -> Family:
    rule = Rule(**test_chunk_update.LACT)
    given = test_chunk_update.tensors(rule, T=20, past=8)
    return Family(fast_weights.OP, test_chunk_update.call(rule), given, test_chunk_update.WIDE)


FAMILIES: dict[str, Callable[[], Family]] = {
    "linear": lambda: linear_of("scalar"),
    "linear of channels": lambda: linear_of("vector"),
    "delta": lambda: delta_of("scalar"),
    "delta of channels": lambda: delta_of("vector"),
    "sliding": sliding_with_sinks,
    "fast weights": fast_weights_of_tokens,
    "fast weights of chunks": fast_weights_of_chunks,
}


@pytest.fixture(params=FAMILIES)
def judgement(
    request: pytest.FixtureRequest, device: torch.device, dtype: torch.dtype
) -> Judgement:
    family = FAMILIES[request.param]()
    return Judgement(family.op, family.call, family.tensors, device, dtype, family.wide)


def found(judgement: Judgement, arithmetic: Arithmetic, **changed: Any) -> float:
    """The largest error of `chunked` in another arithmetic, as a share of what is allowed."""
    given = {**judgement.given, **changed}
    with sdpa_kernel(SDPBackend.MATH), arithmetic:
        made = judgement.run("chunked", given)
    assert arithmetic.met
    return max(judgement.ratios(made).values())


def test_sums_in_another_order_pass_and_faults_do_not(judgement: Judgement) -> None:
    """Between the two lies a factor of hundreds, in float32. What bfloat16 is used for rounds to
    it, so that there it takes a coarser product to be seen."""
    shares = {name: found(judgement, Arithmetic(fn)) for name, fn in REARRANGED.items()}
    assert max(shares.values()) < 0.75, shares
    if judgement.dtype == torch.float32:
        shares = {name: found(judgement, fault) for name, fault in FAULTS.items()}
        for name, x in judgement.given.items():
            shares[f"{name} in bfloat16"] = found(
                judgement, Arithmetic(), **{name: floats(to_bfloat16, x)}
            )
        assert min(shares.values()) > 100, shares
    else:
        assert found(judgement, Arithmetic(operands(to_float8))) > 2
