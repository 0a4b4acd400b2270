"""The delta rule's kernels, against the recurrent form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
GPU = torch.cuda.is_available()
from torch.nn import functional as F

from layerzoo.memories import delta
from layerzoo.memories.delta import OP, delta_rule

CASES: dict[str, tuple[int, int, int, int, int, str]] = {
    "one token": (2, 1, 2, 16, 16, "scalar"),
    "below a chunk": (2, 9, 2, 16, 16, "none"),
    "a chunk": (1, 32, 1, 16, 16, "scalar"),
    "chunks and a rest": (1, 75, 2, 16, 32, "scalar"),
    "odd channels": (2, 37, 1, 5, 19, "constant"),
    "resets": (1, 70, 2, 32, 16, "resets"),
    "no decay": (1, 70, 1, 16, 64, "none"),
}


def arguments(B: int, T: int, H: int, K: int, V: int, decay: str, state: bool = True) -> Any:
    generator = torch.Generator().manual_seed(T + K)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    args = {
        "q": normal(B, T, H, K),
        "k": F.normalize(normal(B, T, H, K), dim=-1),
        "v": normal(B, T, H, V),
        "beta": 2 * normal(B, T, H).sigmoid(),
    }
    if state:
        args["state"] = normal(B, H, K, V)
    if decay == "constant":
        args["log_decay"] = -normal(H).abs() / 10
    elif decay != "none":
        args["log_decay"] = -0.2 * normal(B, T, H).abs()
    if decay == "resets":
        args["log_decay"][:, ::7] = -60.0
        args["beta"][:, ::5] = 0
    return args


def call(impl: str, *, q: Any, k: Any, v: Any, beta: Any, log_decay: Any = None, **kwargs: Any):
    return delta_rule(q, k, v, beta, log_decay, scale=0.3, impl=impl, **kwargs)


WIDE = ("beta", "log_decay", "state")


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(judge: Any, case: str) -> None:
    judge(OP, call, arguments(*CASES[case]), wide=WIDE)
