"""Losses of distillation from hidden states: no [N, vocab] tensor is made or kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from layerzoo.data.task import IGNORE

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Loss(NamedTuple):
    """A loss and, for the log and without a gradient, the means that it is made of, in nats."""

    loss: Tensor
    kl: Tensor
    ce: Tensor


def kl_from_hidden(
    h_student: Float[Tensor, "N D"],
    h_teacher: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    weight: Float[Tensor, "vocab D"],
    *,
    kl: float,
    ce: float,
    temperature: float = 1.0,
    piece: int = 256,
) -> Loss:
    """How far a student is from its teacher, both through one frozen head W.

    loss = kl * mean_n KL(softmax(W h'_n / t) || softmax(W h_n / t))
         + ce * mean_{n: labelled} -log softmax(W h_n)[label_n]

    h: the student's hidden state, h': the teacher's, t: temperature (there is no factor t^2).
    Means over nothing are 0. The gradient is the student's alone; it is computed in the forward
    pass, with the logits of a piece at hand, in float32, float64 for float64. Autocast has no say:
    logits of 20 in bfloat16 are wrong by more than the differences that are learned from.

    Args:
        labels: of the cross entropy; IGNORE where there is none.
        piece: positions whose logits are in memory at a time.

    Raises:
        ValueError: the head needs a gradient.
    """
    if weight.requires_grad:
        raise ValueError("weight: needs a gradient, and this loss gives it none; freeze the head")
    options = kl, ce, temperature, piece
    return Loss(*_FromHidden.apply(h_student, h_teacher.detach(), labels, weight, options))


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        h, h_teacher, labels, weight, (kl, ce, t, piece) = args
        wide = torch.promote_types(h.dtype, torch.float32)
        weight = weight.to(wide)
        labelled = labels != IGNORE
        N, M = max(1, len(h)), labelled.sum().clamp(min=1)
        sums = torch.zeros(2, dtype=wide, device=h.device)
        grad = torch.zeros_like(h, dtype=wide) if ctx.needs_input_grad[0] else None
        with torch.autocast(h.device.type, enabled=False):
            for n in range(0, len(h), piece):
                at = slice(n, n + piece)
                z = h[at].to(wide) @ weight.T
                log_p = F.log_softmax(z / t, -1)
                log_q = F.log_softmax(h_teacher[at].to(wide) @ weight.T / t, -1)
                log_1 = log_p if t == 1 else F.log_softmax(z, -1)
                label, has = labels[at].clamp(min=0)[:, None], labelled[at][:, None]
                sums[0] += (log_q.exp() * (log_q - log_p)).sum()
                sums[1] -= (log_1.gather(-1, label) * has).sum()
                if grad is not None:
                    dz = (log_p.exp() - log_q.exp()) * (kl / (t * N))
                    if ce:
                        dz += log_1.exp().scatter_add(-1, label, -has.to(wide)) * has * (ce / M)
                    grad[at] = dz @ weight
        mean_kl, mean_ce = sums[0] / N, sums[1] / M
        if grad is not None:
            ctx.dtype = h.dtype
            ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(mean_kl, mean_ce)
        return kl * mean_kl + ce * mean_ce, mean_kl, mean_ce

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: the decorator is not typed
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grads[0] * grad).to(ctx.dtype), None, None, None, None


def distance(outputs: Sequence[Tensor], goals: Sequence[Tensor], where: Tensor) -> Tensor:
    """sum_n mean_b |x_nb - x'_nb|^2 / |x'_nb|^2 over the positions where `where` [B, T] is."""
    total = torch.zeros((), dtype=torch.float32, device=where.device)
    for x, goal in zip(outputs, goals, strict=True):
        x, goal = (t[where].to(torch.promote_types(t.dtype, torch.float32)) for t in (x, goal))
        size = goal.square().sum(-1).clamp(min=torch.finfo(goal.dtype).tiny)
        total = total + ((x - goal).square().sum(-1) / size).sum() / len(outputs)
    return total


class KnownGradients(torch.autograd.Function):
    """A loss whose gradients are known, for Lightning to scale, add up, clip and exchange."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, grads: Sequence[Tensor | None], *trained: Tensor
    ) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else grads[0] * g for g in ctx.grads)
