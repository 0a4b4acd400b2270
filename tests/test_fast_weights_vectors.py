"""The fast weights against golden data of other implementations (tests/vectors/README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from layerzoo.memories.fast_weights import GLU, MLP, LinearNetwork, Rule, fast_weights
from layerzoo.memories.fast_weights.forgetting import Norm
from layerzoo.memories.fast_weights.optimisers import Muon
from layerzoo.memories.fast_weights.state import init_state

VECTORS = Path(__file__).parent / "vectors"
IMPLS = ("recurrent", "chunked")
TTT: Any = {"bias": True, "layer_norm": True, "residual": True}
GATES = {"momentum": "momentum", "decay": "decay", "row": "token_idx"}


class Case(NamedTuple):
    """A rule and where a file keeps its arrays.

    weights: names of the matrices, with a bias as `W1 b1`. momentum: those of the initial S.
    transposed: kept as [out, in]. flip: the sign of S. rates: the arrays of lr, one for all or for
    each matrix; unit: of ours in theirs. suffix: of outputs. main: prefix of final
    weights. without: gates of the file that this variant does not use.
    """

    file: str
    rule: Rule
    weights: tuple[str, ...]
    momentum: tuple[str, ...] = ()
    transposed: bool = False
    flip: float = 1.0
    rates: tuple[str, ...] = ("lr",)
    unit: float = 1.0
    suffix: str = ""
    main: str = ""
    without: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.file + self.suffix


def lact(optimiser: Any, place: Any = "end") -> Rule:
    return Rule(
        network=GLU(expansion=9 / 8),
        objective="dot",
        optimiser=optimiser,
        forgetting=Norm(eps=1e-5),
        place=place,
        update="chunk",
    )


def titans(network: Any, C: int) -> Rule:
    return Rule(network=network, optimiser="momentum", forgetting="decay", mini_batch=C)


ALLMEM = Rule(
    network=GLU(residual=True, expansion=9 / 8),
    optimiser="momentum",
    forgetting="norm",
    place="start",
    update="chunk",
)
GLU_ARRAYS: Any = {
    "weights": ("W0", "W1", "W2"),
    "rates": ("lr0", "lr1", "lr2"),
    "transposed": True,
}
NO_MOMENTUM: Any = {"without": ("momentum",)}
MOMENTUM_MUON = Muon(momentum=True)
TTT_MLP = Rule(network=MLP(activation="gelu_tanh", **TTT))
CASES = [
    *(
        Case(f"ttt_linear_{n}", Rule(network=LinearNetwork(**TTT)), ("W1 b1",))
        for n in ("full", "rem")
    ),
    *(Case(f"ttt_mlp_{n}", TTT_MLP, ("W1 b1", "W2 b2")) for n in ("full", "rem")),
    *(
        Case(f"titans_linear_c{C}", titans("linear", C), ("W1",), ("S_W1",), unit=2)
        for C in (1, 16)
    ),
    *(
        Case(
            f"titans_mlp_c{C}", titans(MLP(expansion=1), C), ("W1", "W2"), ("S_W1", "S_W2"), unit=2
        )
        for C in (1, 16)
    ),
    Case("lact_full", lact("sgd"), **GLU_ARRAYS, suffix="_gd", **NO_MOMENTUM),
    Case("lact_full", lact("momentum"), **GLU_ARRAYS, suffix="_mom"),
    Case("lact_full", lact("muon"), **GLU_ARRAYS, suffix="_muon", **NO_MOMENTUM),
    Case("lact_full", lact(MOMENTUM_MUON), **GLU_ARRAYS, suffix="_mommuon"),
    Case("lact_part_mom", lact("momentum"), **GLU_ARRAYS),
    Case("lact_part_mommuon", lact(MOMENTUM_MUON), **GLU_ARRAYS),
    Case("lact_part_prenorm_mommuon", lact(MOMENTUM_MUON, "view"), **GLU_ARRAYS, main="main_"),
    Case(
        "allmem",
        ALLMEM,
        ("W0", "W1", "W2"),
        ("S0", "S1", "S2"),
        transposed=True,
        flip=-1,  # its S is added up the gradient
    ),
]
FILES = sorted({case.file for case in CASES})


def close(got: Tensor, want: Tensor, atol: float) -> None:
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


def test_every_file_is_used() -> None:
    """tests/test_vectors.py has the others."""
    found = [p.stem for p in VECTORS.glob("*.npz")]
    assert sorted(f for f in found if f.startswith(("ttt", "titans", "lact", "allmem"))) == FILES


def load(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    with np.load(VECTORS / f"{case.file}.npz") as file:
        data = {k: torch.from_numpy(x) for k, x in file.items() if x.dtype == np.float64}
    for name in data:
        if f"d_{name}" in data:
            data[name] = data[name].to(dtype).requires_grad_()
    return data


def run(case: Case, data: dict[str, Tensor], dtype: torch.dtype, impl: str, cuts: Any) -> Any:
    """Outputs and final state, named as in the file."""

    def matrix(name: str) -> Tensor:
        if " " in name:
            W, b = (data[part].to(dtype) for part in name.split())
            return torch.cat((W, b.unsqueeze(-2)), -2)
        return data[name].mT.to(dtype) if case.transposed else data[name].to(dtype)

    def named(name: str, W: Tensor) -> dict[str, Tensor]:
        if " " in name:
            return dict(zip(name.split(), (W[..., :-1, :], W[..., -1, :]), strict=True))
        return {case.main + name: W.mT if case.transposed else W}

    rule, weights = case.rule, tuple(matrix(name) for name in case.weights)
    tokens = {name: data[name].to(dtype) for name in "qkv"}
    tokens["lr"] = torch.stack([data[n].to(dtype) for n in case.rates], -1) * case.unit
    whole: dict[str, Any] = {}
    for gate, name in GATES.items():
        if name in data and gate not in case.without:
            (whole if gate == "row" else tokens)[gate] = data[name].to(dtype)
    if rule.network.layer_norm:
        whole["layer_norm"] = (data["ln_weight"].to(dtype), data["ln_bias"].to(dtype))
    state = init_state(rule, weights, 2)
    if case.momentum:
        state["momentum"] = tuple(case.flip * matrix(name) for name in case.momentum)
    outputs = []
    for piece in zip(*(x.split(cuts, 1) for x in tokens.values()), strict=True):
        x: Any = dict(zip(tokens, piece, strict=True))
        o, state = fast_weights(**x, weights=weights, spec=rule, state=state, impl=impl, **whole)
        outputs.append(o)
    now = state["weights"]
    place = int(state["position"]) % rule.mini_batch if "position" in state else 0
    if place and rule.update == "token":  # the file has what the last token read
        row = whole["row"][place - 1] if "row" in whole else 1
        A = state["retention"][..., None, None] if "retention" in state else 1
        now = [A * W + row * U for W, U in zip(now, state["updates"], strict=True)]
    final: dict[str, Tensor] = {}
    for n, name in enumerate(case.weights):
        final |= named(name, now[n])
        if "momentum" in state:
            S = case.flip * state["momentum"][n]
            short = f"S{name[1:]}" if case.transposed else f"S_{name}"
            final[short] = S.mT if case.transposed else S
        if place and "token_idx" in data:
            for part, A in named(name, state["updates"][n]).items():
                final[f"acc_{part}"] = -A
    found = {f"o{case.suffix}": torch.cat(outputs, 1)}
    for name, x in final.items():
        key = f"grad_{name}" if name.startswith("acc_") else f"final_{name}{case.suffix}"
        if key in data:
            found[key] = x
    return found


def tolerances(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Of outputs, absolute, and of gradients, of the largest entry."""
    muon = isinstance(case.rule.optimiser, Muon)
    if dtype == torch.float32:
        return 2e-5, 1e-3
    if case.file.startswith("ttt_mlp"):  # its GELU has rounded constants
        return 1e-8, 1e-7
    return 1e-11, 1e-8 if muon else 1e-9


@pytest.mark.parametrize("cuts", ["whole", "cut"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_vectors(case: Case, dtype: torch.dtype, impl: str, cuts: str) -> None:
    data = load(case, dtype)
    T = data["q"].shape[1]
    found = run(case, data, dtype, impl, T if cuts == "whole" else [1, 6, 13, T - 20])
    forward, backward = tolerances(case, dtype)
    ends = {key for key in data if key.split("_")[0] in ("o", "final", "grad")}
    assert {key for key in ends if key.endswith(case.suffix)} == found.keys()
    for key, x in found.items():
        assert x.dtype == dtype
        close(x, data[key].detach().double(), forward)
    weights = {key[2:]: x for key, x in data.items() if key.startswith("w_")}
    assert weights.keys() <= found.keys()
    if not weights:
        return
    loss = sum((found[key] * w.to(dtype)).sum() for key, w in weights.items())
    assert isinstance(loss, Tensor)
    names = [key[2:] for key in data if key.startswith("d_")]
    for name, grad in zip(names, torch.autograd.grad(loss, [data[n] for n in names]), strict=True):
        scale = float(data[f"d_{name}"].abs().max())
        close(grad, data[f"d_{name}"], backward * scale)
