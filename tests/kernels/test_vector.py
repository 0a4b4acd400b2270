"""The kernels of decays per key channel inside chunks: against the formulas written out in
float64, by the errors that `ChannelDecays` makes in the same dtype: see tests/precision.py."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo.kernels import launch, vector
from layerzoo.memories.common.decays import FLOOR, ChannelDecays, StateGradients
from layerzoo.testing.precision import DRAWS, check_precision, errors

from .conftest import GPU, rescaled

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
"""float16 has a reach of 4 alone, so that chunks are mild and strong in turn."""


class Case(NamedTuple):
    """decay: of g. parts: (q,) or (q, k) read."""

    decay: str
    parts: int
    T: int
    C: int
    B: int = 1
    H: int = 1
    K: int = 16


CASES = [
    Case("mild", 2, 40, 16, B=2, H=2),
    Case("mild", 1, 16, 16),
    Case("strong", 1, 23, 32, H=3),
    Case("resets", 2, 64, 32, K=64),
    Case("resets", 1, 33, 16, B=2, K=32),
    Case("lone reset", 2, 70, 64, K=32),
    Case("medium", 2, 40, 32, B=2, H=2),
    Case("medium", 1, 64, 32, K=128),
    Case("none", 2, 1, 16),
]
if GPU:
    CASES += [
        Case(decay, parts, 300, C, B=2, H=3, K=K)
        for decay in ("mild", "strong", "resets")
        for parts in (1, 2)
        for C in (16, 32, 64)
        for K in (64, 128)
    ]


RUNS = [
    (case, dtype)
    for case in CASES
    for dtype in DTYPES
    if not (GPU and case.C == 64 and dtype == torch.float32)  # its chunks are shorter
]


def given(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (case.B, case.T, case.H, case.K)
    q, k = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    g = -torch.rand(shape, generator=generator)
    g = g * {"none": 0.0, "strong": 12.0, "medium": 0.6}.get(case.decay, 0.1)
    if case.decay == "resets":  # of half the channels, or nothing would be left to compare
        some = g[..., ::2]
        some[torch.rand(some.shape, generator=generator) < 0.1] = -torch.inf
        some[torch.rand(some.shape, generator=generator) < 0.1] = -25.0
    if case.decay == "lone reset":
        g[:, 3] = -torch.inf
    return q, k, g.to(device)


def formulas(q: Tensor, k: Tensor, g: Tensor, case: Case) -> list[Tensor]:
    """scores, reads, fades and whole, from their definition."""
    C = case.C
    scores, reads, fades, whole = [[], []], [[], []], [], []
    for x, y, log in zip(*(t.split(C, 1) for t in (q, k, g)), strict=True):
        G = log.cumsum(1)
        n = G.shape[1]
        between = G[:, :, None] - G[:, None]
        for p, row in enumerate((x, y)):
            unseen = G.new_ones(n, n).tril(-p)[None, :, :, None, None] == 0
            ratio = between.masked_fill(unseen, -torch.inf).exp()
            found = torch.einsum("bihc,bjhc,bijhc->bihj", row, y, ratio)
            scores[p].append(F.pad(found, (0, C - n)))
            reads[p].append(row * G.exp())
        fades.append(y * (G[:, -1:] - G).exp())
        whole.append(G[:, -1].exp())
    found = [*scores[: case.parts], *reads[: case.parts], fades]
    return [*(torch.cat(x, 1) for x in found), torch.stack(whole, 1)]


def portable(
    q: Tensor, k: Tensor, g: Tensor, case: Case, grads: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The same outputs, and gradients, by ChannelDecays, in the dtype of q."""
    dtype, parts, C, T = q.dtype, case.parts, case.C, case.T
    n = -(-T // C)

    def fold(x: Tensor) -> Tensor:
        """[B, T, H, D] -> [n, B H, C, D]."""
        x = F.pad(x, (0, 0, 0, 0, 0, n * C - T)).unflatten(1, (n, C))
        return x.permute(1, 0, 3, 2, 4).flatten(1, 2)

    def unfold(x: Tensor) -> Tensor:
        x = x.unflatten(1, (case.B, case.H)).permute(1, 0, 3, 2, 4)
        return x.flatten(1, 2)[:, :T]

    rows = torch.stack([fold(x) for x in (q, k)[:parts]], 2)
    keys = fold(k)
    decays = ChannelDecays(fold(g.clamp(min=FLOOR).to(dtype)))
    scores, reads = decays.scores(rows, keys), decays.read(rows)
    whole = decays.whole.mT.unflatten(1, (case.B, case.H)).squeeze(3).transpose(0, 1)
    outs = [unfold(x[:, :, p]) for x in (scores, reads) for p in range(parts)]
    outs += [unfold(decays.fade(keys)), whole]
    d_scores, d_reads = (
        torch.stack([fold(x.to(dtype)) for x in grads[a : a + parts]], 2) for a in (0, parts)
    )
    d_rows, d_k = decays.read(d_reads), decays.fade(fold(grads[-2].to(dtype)))
    # A state of one column, of ones: its gradient is that of the whole chunk's decays.
    d_states = grads[-1].transpose(0, 1).flatten(1, 2).to(dtype).unsqueeze(-1)
    into = StateGradients(d_rows, d_k, torch.ones_like(d_states), d_states)
    d_g = decays.backward(d_scores.tril(), scores, rows, keys, into)
    assert d_g is not None
    if parts == 2:
        into.d_k.add_(into.d_rows[:, :, 1])
    pulled = [unfold(x) for x in (into.d_rows[:, :, 0], into.d_k, d_g)]
    return outs, [*pulled[:2], pulled[2] * (g >= FLOOR)]


@pytest.mark.parametrize(
    ("case", "dtype"), RUNS, ids=["-".join(map(str, (*c, d))) for c, d in RUNS]
)
@pytest.mark.usefixtures("poison")
def test_vector_follows_the_formulas(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    names = [f"{x} {p}" for x in ("scores", "reads") for p in range(case.parts)]
    names += ["fades", "whole", "dq", "dk", "dg"]
    first, reference = given(case, dtype, device), []
    for draw in range(DRAWS):
        q, k, g = rescaled(first, draw) if draw else first
        exact = [x.double().requires_grad_() for x in (q, k, g)]
        want = formulas(exact[0], exact[1], exact[2].clamp(min=FLOOR), case)
        generator = torch.Generator().manual_seed(1)
        d = [torch.randn(x.shape, generator=generator).to(device, dtype) for x in want]
        loss = torch.stack([(x * w.double()).sum() for x, w in zip(want, d, strict=True)]).sum()
        want = [x.detach() for x in (*want, *torch.autograd.grad(loss, exact))]
        named = dict(zip(names, want, strict=True))
        found, grads = portable(q, k, g, case, d)
        reference.append(errors(dict(zip(names, found + grads, strict=True)), named))
        if not draw:
            made = errors(dict(zip(names, kernels(q, k, g, case, d), strict=True)), named)
    check_precision([made], reference, torch.finfo(dtype).eps / 2)


def kernels(q: Tensor, k: Tensor, g: Tensor, case: Case, d: list[Tensor]) -> list[Tensor]:
    """The outputs, and gradients, of the kernels. d: the gradients of the outputs."""
    rows, n = (q, k)[: case.parts], case.parts
    made = vector.forward(rows, k, g, case.C)
    into = tuple(d[:n]), tuple(d[n : 2 * n]), d[-2], d[-1].float()
    pulled = vector.backward(rows, k, g, case.C, *into)
    return [*made.scores, *made.reads, made.fades, made.whole, *pulled]


@pytest.mark.usefixtures("poison")
def test_vector_keeps_the_digits_of_mild_decays_after_a_reset(device: torch.device) -> None:
    case = Case("lone reset", 1, 32, 32)
    q, k, g = given(case, torch.float32, device)
    found = vector.forward((q,), k, g, case.C).scores[0][:, 4:, :, 4:]
    alone = vector.forward((q[:, 4:],), k[:, 4:], g[:, 4:], case.C).scores[0][..., :28]
    found, alone = found.double(), alone.double()
    assert float((found - alone).norm()) < 3e-7 * float(alone.norm())


def test_vector_takes_what_is_not_contiguous(device: torch.device) -> None:
    q, k, g = (x[..., ::2] for x in given(Case("mild", 1, 20, 16, K=32), torch.float32, device))
    whole = vector.forward((q,), k, g, 16)
    again = vector.forward((q.contiguous(),), k.contiguous(), g.contiguous(), 16)
    assert torch.equal(whole.scores[0], again.scores[0])


@pytest.mark.parametrize("name", list(launch.TARGETS))
def test_vector_settings_divide_the_channels(name: str) -> None:
    for dtype, C in ((torch.bfloat16, 64), (torch.float32, 32)):
        for K in (16, 32, 64, 128):
            for parts in (1, 2):
                for choose in (vector.settings, vector.settings_backward):
                    s = choose(parts, C, K, dtype, launch.TARGETS[name])
                    assert K % s.strong == 0 and (s.mild == 0 or K % s.mild == 0)
                    assert s.span == 0 or (s.span % s.strong == 0 and s.span % s.mild == 0)
                    assert s.span == 0 or K % s.span == 0
