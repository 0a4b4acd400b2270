"""Linear attention: the additive memory S_t = D_t S_{t-1} + k_t^T v_t, its op and its layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from layerzoo.checked import LOGARITHM, Signature
from layerzoo.layer import State
from layerzoo.memory import Write
from layerzoo.ops import Op, once_differentiable
from layerzoo.shell import QKV
from layerzoo.spec import SpecError

from ..common.chunks import (
    add_product,
    chunk_size,
    fold,
    pad_tokens,
    product,
    segments,
    stack,
    tiles,
    unfold,
)
from ..common.decays import FLOOR, Pulled, decays_of
from ..common.matrix import MatrixConfig, MatrixMemory, per_token, zero_state
from .features import FEATURE_MAPS

if TYPE_CHECKING:
    from jaxtyping import Float

OP = Op("linear_attention", kernel="linear")


SIGNATURE = Signature(log_decay=LOGARITHM)


@SIGNATURE
def linear_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, " H"]
    | Float[Tensor, "B T H"]
    | Float[Tensor, "B T H K"]
    | None = None,
    *,
    scale: float = 1.0,
    state: Float[Tensor, "B H K V"] | None = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """S_t = D_t S_{t-1} + k_t^T v_t,  o_t = scale q_t S_t (read after write).

    Args:
        log_decay: natural logarithm of D_t, <= 0: None is D_t = 1; `[H]` constant (RetNet);
            `[B, T, H]` scalar (Mamba-2, simple GLA); `[B, T, H, K]` vector, D_t = diag (GLA).
        state: S_0, default zero.
        impl: auto, recurrent, chunked or triton.

    Returns:
        o in q's dtype and S_T in float32 (float64 for float64 input).

    Raises:
        SpecError: an argument of another shape, or a positive log_decay (see `Signature`).
        ImplError: an impl that cannot run here.

    Source: Katharopoulos et al. 2020, arXiv 2006.16236, eq. 18-20, without its normaliser;
    decays: 2307.08621 (constant), 2405.21060 (scalar), 2312.06635 (vector).
    """
    if not is_compiling():
        SIGNATURE.check(locals())
    state = zero_state(k, v) if state is None else state
    return OP(impl, q, k, v, log_decay, scale=scale, state=state)


@OP.register("recurrent")
def _recurrent(q, k, v, log_decay, *, scale, state):
    decay = per_token(log_decay, k).exp()
    outputs = []
    for t in range(q.shape[1]):
        write = k[:, t].unsqueeze(-1) @ v[:, t].unsqueeze(-2)
        state = decay[:, t].unsqueeze(-1) * state + write
        outputs.append((scale * q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), state


@OP.register("chunked")
def _chunked(q, k, v, log_decay, *, scale, state):
    if (T := q.shape[1]) <= 1:
        return (_step if T else _recurrent)(q, k, v, log_decay, scale=scale, state=state)
    size = chunk_size(T)
    if log_decay is not None:
        log_decay = pad_tokens(per_token(log_decay, k).clamp(min=FLOOR), size)
    q, k, v = (pad_tokens(x, size) for x in (q, k, v))
    o, state = Chunked.apply(q, k, v, log_decay, state, scale, size, torch.is_grad_enabled())
    return o[:, :T], state


def _step(q, k, v, log_decay, *, scale, state):
    """One token, in the fewest operations: what decoding waits for."""
    rows = state.shape[:2]
    if log_decay is not None:
        state = state * per_token(log_decay, k)[:, 0].exp().unsqueeze(-1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B H, 1, D]
    state = torch.baddbmm(state.flatten(0, 1), k.mT, v)
    o = torch.bmm(q, state).mul(scale).unflatten(0, rows).transpose(1, 2)
    return o, state.unflatten(0, rows)


class Chunked(torch.autograd.Function):
    """S' = D S + (k until)^T v from chunk to chunk, and o = (q since) S + scores v inside one."""

    @staticmethod
    def forward(ctx: Any, q, k, v, g, state, scale, size, keep) -> Any:
        B, _, H, _ = q.shape
        o, saved = torch.empty_like(v), []
        Q, Ks, Vs, Gs, Os = tiles(size, q, k, v, g, o)
        state = state.flatten(0, 1)
        for s in segments(Q):
            rows, ks, vs = stack(Q[s]), fold(Ks[s]), fold(Vs[s])
            decays = decays_of(None if g is None else fold(Gs[s]), 1, ks)
            added = product(decays.fade(ks).mT, vs)
            states = added.new_empty(len(added) + 1, *added.shape[1:])
            states[0] = state
            for n, (more, whole) in enumerate(zip(added, decays.whole, strict=True)):
                state = torch.addcmul(more, state, whole, out=states[n + 1])
            out = product(decays.read(rows)[:, :, 0], states[:-1])
            add_product(out, decays.scores(rows, ks)[:, :, 0], vs)
            unfold(out.mul_(scale), Os[s])
            if keep:
                saved.append(states)
        ctx.scale, ctx.size = scale, size
        ctx.save_for_backward(q, k, v, g, *saved)
        return o, state.unflatten(0, (B, H)).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        do, d_state = grad_outputs
        q, k, v, g, *saved = ctx.saved_tensors
        grads = [None if x is None else torch.empty_like(x) for x in (q, k, v, g)]
        Q, Ks, Vs, Gs, Os, dQ, dK, dV, dG = tiles(ctx.size, q, k, v, g, do, *grads)
        B, H, d_state = *Q.shape[1:3], d_state.flatten(0, 1)
        for s in reversed(segments(Q)):
            states = saved.pop()
            rows, ks, vs, dos = stack(Q[s]), fold(Ks[s]), fold(Vs[s]), fold(Os[s]) * ctx.scale
            decays = decays_of(None if g is None else fold(Gs[s]), 1, ks)
            added = product(decays.read(rows)[:, :, 0].mT, dos)
            d_states = torch.empty_like(states)
            d_states[-1] = d_state
            for n in reversed(range(len(added))):
                d_state = torch.addcmul(added[n], d_state, decays.whole[n], out=d_states[n])
            d_states = d_states[1:]  # of the states that the chunks leave
            d_rows = decays.read(product(dos, states[:-1].mT).unsqueeze(2))
            dk = decays.fade(product(vs, d_states.mT))
            dv, scores = product(decays.fade(ks), d_states), decays.scores(rows, ks)
            add_product(dv, scores[:, :, 0].mT, dos)
            grad = product(dos, vs.mT).unsqueeze(2)
            dg = decays.pull(grad, scores, rows, ks, Pulled(d_rows, dk, states[:-1], d_states))
            for x, out in ((d_rows, dQ), (dk, dK), (dv, dV)):
                unfold(x, out[s])
            if dg is not None:
                unfold(dg, dG[s])
        return *grads, d_state.unflatten(0, (B, H)), None, None, None


class Linear(MatrixMemory, name="linear"):
    """Linear attention, with an optional decay, feature map and normaliser.

    S_t = D_t S_{t-1} + phi(k_t)^T v_t,   o_t = phi(q_t) S_t  [ / phi(q_t) z_t,
    z_t = D_t z_{t-1} + phi(k_t)^T, the normaliser, held as one more column of S ]

    S: [F, V] per head, with F features. The defaults are the plain sum of outer products: no
    decay, phi(x) = x, no normaliser. Deviation: one shell for all memories (unit q and k, RMS norm
    of the read-out, which takes the normaliser's place).
    """

    class Config(MatrixConfig):
        feature_map: Literal["identity", "elu1", "relu", "softmax", "taylor"] = "identity"
        """This is phi. It is identity; elu1, elu(x) + 1 (Katharopoulos et al.); relu; softmax over
        the channels; or taylor, 1 + s q k + (s q k)^2 / 2 with s the shell's scale of q k (Based,
        arXiv 2402.18668): F = 1 + K + K (K + 1) / 2."""
        normaliser: bool = False
        """If true, the read-out is divided by phi(q) z, held at 1e-6 or more. It needs a positive
        feature map."""

        def check(self) -> None:
            super().check()
            phi, decay = FEATURE_MAPS[self.feature_map], self.decay
            if self.rotary and self.feature_map != "identity":
                raise SpecError(
                    f"rotary: turns q and k before feature_map '{self.feature_map}', behind which "
                    f"their product is not one of relative positions; set rotary: null"
                )
            if self.normaliser and not (phi.each_positive if decay == "vector" else phi.positive):
                good = [n for n, m in FEATURE_MAPS.items() if m.each_positive]
                raise SpecError(
                    f"normaliser: feature_map '{self.feature_map}' with decay '{decay}' gives "
                    f"sums of both signs, and so zero divisors; use {', '.join(good)}"
                )

    source = "Katharopoulos et al. 2020, arXiv 2006.16236"
    op = OP
    cases = (
        {"heads": 2},
        {"heads": 3, "decay": "constant", "qk_norm": "none", "out_norm": "none"},
        {"heads": 2, "decay": "scalar", "out_gate": "silu", "feature_map": "elu1"},
        {"heads": 2, "decay": "vector", "key_dim": 5, "value_dim": 7, "qk_norm": "rms"},
        {"key_dim": 3, "decay": "constant", "feature_map": "taylor", "normaliser": True},
        {"heads": 2, "feature_map": "relu", "normaliser": True, "qk_norm": "rms"},
        {"heads": 2, "feature_map": "softmax", "normaliser": True, "decay": "vector"},
    )

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__(dim, config)
        self.inner_scale = self.scale**0.5 if config.feature_map == "taylor" else 1.0
        if config.feature_map != "identity":
            self.scale = 1.0

    def matrix(self) -> tuple[int, int]:
        features = FEATURE_MAPS[self.config.feature_map].size(self.key_dim)
        return features, self.value_dim + self.config.normaliser

    def project(self, x: Tensor, start: int = 0, qkv: QKV | None = None) -> tuple[Tensor, Write]:
        q, write = super().project(x, start, qkv)
        phi = FEATURE_MAPS[self.config.feature_map].phi
        q, write["k"] = (phi(t * self.inner_scale) for t in (q, write["k"]))
        if self.config.normaliser:
            write["v"] = F.pad(write["v"], (0, 1), value=1.0)
        return q, write

    def rule(self, q: Tensor, write: Write, state: State) -> tuple[Tensor, State]:
        o, state = linear_attention(q, **write, **self.constants(), state=state)
        return self.normalised(o), state

    def read(self, q: Tensor, state: State) -> Tensor:
        return self.normalised(super().read(q, state))

    def normalised(self, o: Tensor) -> Tensor:
        return o[..., :-1] / o[..., -1:].clamp(min=1e-6) if self.config.normaliser else o

    def rule_flops(self, T: int) -> float:
        features, columns = self.matrix()
        return self.heads * 4 * features * columns
