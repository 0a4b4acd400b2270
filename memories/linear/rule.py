"""Linear attention, the additive memory: op, chunk form and layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from layerzoo.layer import State
from layerzoo.ops import Op
from layerzoo.shell import QKV
from layerzoo.signature import LOGARITHM, Signature
from layerzoo.spec import SpecError

from ..common.matrix import MatrixConfig, MatrixMemory, per_token, zero_state
from ..common.plain import chunk_decays, chunks
from . import chunked
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
    """Each token adds its key and value to the memory, and then reads it.

    S_t = D_t S_{t-1} + k_t^T v_t,   o_t = scale q_t S_t

    where

    - S_t `[K, V]` is the state of a head, S_0 is `state`, and S_T is returned;
    - q_t, k_t `[K]` and v_t `[V]` are a token's query, key and value, as rows;
    - D_t = exp(log_decay_t) is the decay, a number or the diagonal of a matrix.

    Args:
        q: The queries.
        k: The keys.
        v: The values.
        log_decay: The natural logarithm of the decay, at most 0. None is no decay, `[H]` a
            constant per head (RetNet), `[B, T, H]` a number per token (Mamba-2, simple GLA),
            `[B, T, H, K]` a number per key channel (GLA).
        scale: What is read is multiplied by this number.
        state: The state before the first token; None is zero.
        impl: Run this implementation: auto, recurrent, chunked or triton.

    Returns:
        The read-outs in q's dtype, and the state after the last token in float32 (float64 for
        float64 input).

    Raises:
        SpecError: An argument has another shape, or a log_decay is positive.
        ImplError: The impl cannot run here.

    Source: Katharopoulos et al. 2020, arXiv 2006.16236, eq. 18-20, without its normaliser;
    decays: 2307.08621 (constant), 2405.21060 (per token), 2312.06635 (per channel).
    """
    if not is_compiling():
        SIGNATURE.check(locals())
    state = zero_state(k, v) if state is None else state
    return OP(impl, q, k, v, log_decay, scale=scale, state=state)


@OP.register("recurrent")
def recurrent(q, k, v, log_decay, *, scale, state):
    """The specification: the formula of `linear_attention`, token by token."""
    decay = per_token(log_decay, k).exp()
    outputs = []
    for t in range(q.shape[1]):
        write = k[:, t].unsqueeze(-1) @ v[:, t].unsqueeze(-2)
        state = decay[:, t].unsqueeze(-1) * state + write
        outputs.append((scale * q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), state


def chunk_form(q, k, v, log_decay=None, *, scale=1.0, state=None, size=16):
    """`linear_attention` in chunks of `size` tokens, to be read beside GLA's section 4.

    With the state S before a chunk, and d(j, i) the decay from after token j until token i,

    o_i = scale ((q_i d(0, i)) S + sum_{j <= i} (q_i d(j, i)) k_j^T v_j)
    S_new = d(0, C) S + sum_j (k_j d(j, C))^T v_j
    """
    state = zero_state(k, v) if state is None else state
    log_decay = per_token(log_decay, k).expand(k.shape)
    outputs = []
    for queries, keys, values, decays in chunks(size, q, k, v, log_decay):
        since_start, until_end, between = chunk_decays(decays)
        products = torch.einsum("bhik,bhijk,bhjk->bhij", queries, between, keys)
        read = (queries * since_start) @ state + products @ values
        outputs.append(scale * read.transpose(1, 2))
        state = since_start[:, :, -1, :, None] * state + (keys * until_end).mT @ values
    return torch.cat(outputs, 1), state


OP.register("chunked")(chunked.run)


class LinearWrite(NamedTuple):
    """What each token writes, named as the arguments of `linear_attention`."""

    k: Float[Tensor, "B T H F"]
    v: Float[Tensor, "B T H V"]
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H F"] | None


class LinearAttention(MatrixMemory, name="linear"):
    """Linear attention, with an optional decay, feature map and normaliser.

    S_t = D_t S_{t-1} + phi(k_t)^T v_t,   o_t = phi(q_t) S_t

    and with the normaliser o_t = phi(q_t) S_t / phi(q_t) z_t,   z_t = D_t z_{t-1} + phi(k_t)^T,

    where

    - S_t `[F, V]` is the state of a head, with F features;
    - phi is the feature map, and q_t, k_t, v_t are projections of x_t;
    - D_t is the decay, which is 1 unless `decay` says otherwise;
    - z_t `[F]` is held as one more column of S.

    The defaults are the plain sum of outer products: no decay, phi(x) = x, no normaliser.
    Deviation: the layer has the shell that all memories share, with unit q and k, and with an RMS
    norm of the read-out, which takes the normaliser's place.
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

    def features(self, x: Tensor) -> Tensor:
        """phi of queries or keys."""
        return FEATURE_MAPS[self.config.feature_map].phi(x * self.inner_scale)

    def project(
        self, x: Tensor, start: int = 0, qkv: QKV | None = None
    ) -> tuple[Tensor, LinearWrite]:
        q, write = super().project(x, start, qkv)
        return self.features(q), write

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> Any:
        return LinearWrite(*self.featured(k, v), self.log_decay(x) if self.gated else None)

    def featured(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """phi(k), and v with the column of ones that z is made of, if there is a normaliser."""
        return self.features(k), F.pad(v, (0, 1), value=1.0) if self.config.normaliser else v

    def rule(self, q: Tensor, write: Any, state: State) -> tuple[Tensor, State]:
        k, v, log_decay = write
        if self.config.decay == "constant":
            log_decay = self.log_decay()
        o, state = OP(self.impl, q, k, v, log_decay, scale=self.scale, state=state)
        return self.normalised(o), state

    def read(self, q: Tensor, state: State) -> Tensor:
        return self.normalised(super().read(q, state))

    def normalised(self, o: Tensor) -> Tensor:
        return o[..., :-1] / o[..., -1:].clamp(min=1e-6) if self.config.normaliser else o

    def rule_flops(self, T: int) -> float:
        features, columns = self.matrix()
        return self.heads * 4 * features * columns
