"""Launches: what kernels refuse, what is recorded in place of a run, and who trusts whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerzoo.kernels import launch
from layerzoo.memories.delta import delta_rule
from layerzoo.memories.linear import linear_attention
from layerzoo.ops import ImplError

from .conftest import DISTRUSTED

OTHER = launch.TARGETS["gfx942"]._replace(multiprocessors=7)  # no machine's
HOPPER = launch.TARGETS["sm_90"]


def inputs(device: torch.device, channels: bool = True) -> tuple[Any, ...]:
    q, k, v = torch.randn(3, 1, 20, 2, 16, device=device)
    return q, k, v, -torch.rand(1, 20, 2, *((16,) if channels else ()), device=device)


def test_what_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert launch.refusal(torch.zeros(2)) == "it needs a GPU, and the tensors are on cpu"
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert launch.refusal(torch.zeros(2), None) is None
    message = "it computes in float32, bfloat16 or float16, not in float64"
    assert launch.refusal(torch.zeros(2), torch.zeros(2).double()) == message


def test_recorded_launches_do_not_run(device: torch.device, monkeypatch: Any) -> None:
    q, k, v, g = inputs(device, channels=False)
    monkeypatch.setattr(launch, "POISON", [float("nan")])
    with launch.recorded(OTHER) as found:
        assert launch.target(device) == OTHER
        o, _ = linear_attention(q, k, v, g, impl="triton")
    assert {one.kernel.__name__ for one in found} == {"scan"} and o.isnan().all()
    assert launch.target(device) != OTHER
    assert not linear_attention(q, k, v, g, impl="triton")[0].isnan().any()


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_gradients_that_have_been_wrong_are_refused(
    rule: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper, with the Triton with which they were: of a decay per channel, or wide heads."""

    def call(g: torch.Tensor) -> Any:
        if rule == "linear":
            return linear_attention(q, k, v, g, impl="triton")
        return delta_rule(q, k, v, torch.rand(1, 20, 2, device=device), g, impl="triton")

    q, k, v, g = inputs(device)
    q.requires_grad_()
    monkeypatch.setattr(launch, "distrusted", DISTRUSTED)
    monkeypatch.setattr(launch, "target", lambda _: HOPPER)
    monkeypatch.setattr(launch, "TRITON", (3, 6, 0))
    with pytest.raises(ImplError, match=r"need Triton 3\.7\.1 or later on a Hopper GPU"):
        call(g)
    call(g[..., 0])
    with torch.no_grad():
        call(g)
    if rule == "linear":
        wide = torch.randn(3, 1, 4, 2, 129, device=device, requires_grad=True)
        with pytest.raises(ImplError, match="gradients of more than 128 channels need Triton"):
            linear_attention(*wide, impl="triton")
    monkeypatch.setattr(launch, "TRITON", (3, 7, 1))
    call(g)


def test_padding() -> None:
    assert [launch.power_of_two(n) for n in (1, 16, 17, 64, 100)] == [16, 16, 32, 64, 128]
    assert launch.power_of_two(1, 1) == 1
    x = torch.randn(2, 3)
    assert launch.pad_channels(x, 3) is x
    assert launch.pad_channels(x, 4).tolist() == [[*row, 0.0] for row in x.tolist()]
