"""Forgetting attention (FoX): its op, softmax attention whose logits decay, and its layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from layerzoo.annotations import tensor
from layerzoo.attend import CACHE, append, attend_one, empty_cache
from layerzoo.layer import Reach, Reduction, State, StateBytes
from layerzoo.ops import Op, accumulator_dtype
from layerzoo.shell import QKV
from layerzoo.signature import LOGARITHM, Signature
from layerzoo.spec import SpecError

from ..common import Attention
from ..sliding.rule import check_window, sum_of_seen, window_cautions
from . import chunked

if TYPE_CHECKING:
    from jaxtyping import Float

OP = Op("forgetting_attention")


SIGNATURE = Signature(CACHE | {"log_forget": tensor("B n H")}, log_forget=LOGARITHM)


@SIGNATURE
def forgetting_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    log_forget: Float[Tensor, "B T H"],
    *,
    window: int | None = None,
    scale: float | None = None,
    state: State = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], State]:
    """Softmax attention whose logits fall with every forget gate between the key and the query.

    o_i = sum_{j <= i} softmax_j(scale <q_i, k_j> + F_i - F_j) v_j,   F_i = sum_{l <= i} log f_l

    where

    - q_i, k_j `[K]` and v_j `[V]` are a query, a key and a value of one head;
    - log f_l = log_forget_l is the logarithm of token l's forget gate, for each query head;
    - j runs over the last `window` tokens, if there is a window.

    Args:
        q: The queries. Query head h reads key and value head h // (H / G).
        k: The keys.
        v: The values.
        log_forget: The logarithm of the forget gate of every token and query head, at most 0.
        window: A query sees this many tokens, itself included; None is all of them.
        scale: The products of q and k are multiplied by this number; None is K^-1/2.
        state: The cache {k, v, log_forget, position}; None is empty. It grows with T, or holds the
            last window - 1 tokens. It keeps the gates and not their sums, which would grow without
            bound; a call adds up, in float64, those of the tokens that it can see.
        impl: Run this implementation: auto, recurrent, chunked or triton.

    Returns:
        The read-outs in q's dtype, and the cache after the new tokens.

    Raises:
        SpecError: window < 1, an argument has another shape, G does not divide H, or a log_forget
            is positive.
        ImplError: The impl cannot run here.

    The backward pass of `chunked` has no derivative of its own; `recurrent` has all.

    Source: Lin et al. 2025, arXiv 2503.02130, eq. 6.
    """
    if not is_compiling():
        SIGNATURE.check(locals())
    if window is not None:
        check_window(window)
    if state is None:
        state = empty(empty_cache(k, v), q.shape[2])
    new = {"k": k, "v": v, "log_forget": log_forget.to(state["log_forget"].dtype)}
    cache = {name: append(state[name], t) for name, t in new.items()}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o = OP(impl, q, *cache.values(), window=window, scale=scale)
    surplus = 0 if window is None else max(0, cache["k"].shape[1] - (window - 1))
    if surplus:  # a view would keep all of the tensor
        cache = {name: t[:, surplus:].clone() for name, t in cache.items()}
    return o, {**cache, "position": state["position"] + q.shape[1]}


def empty(cache: State, heads: int) -> State:
    """An empty cache with place for the gates."""
    k, v, position = cache.values()
    gates = torch.empty(len(k), 0, heads, dtype=accumulator_dtype(k), device=k.device)
    return {"k": k, "v": v, "log_forget": gates, "position": position}


@OP.register("recurrent")
def _recurrent(q, k, v, log_forget, *, window, scale):
    sums = log_forget.double().cumsum(1)
    past = k.shape[1] - q.shape[1]
    outputs = []
    for t in range(q.shape[1]):
        i = past + t
        seen = slice(0 if window is None else max(0, i + 1 - window), i + 1)
        bias = (sums[:, i, None] - sums[:, seen]).to(q.dtype).mT
        outputs.append(attend_one(q[:, t], k[:, seen], v[:, seen], scale, bias))
    return torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])


def chunk_form(q, k, v, log_forget, *, window=None, scale=None, size=16):
    """`forgetting_attention` of a whole sequence, `size` queries at a time, in plain terms.

    o_i = sum_j softmax_j(scale <q_i, k_j> + F_i - F_j) v_j over the tokens j that query i sees,
    where F is the running sum of the logarithms of the forget gates.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window = q.shape[1] if window is None else window
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    total, tokens = log_forget.mT.cumsum(-1), torch.arange(q.shape[1])  # F: [B, H, T]
    outputs = []
    for start in range(0, len(tokens), size):
        i, j = tokens[start : start + size, None], tokens[: start + size]
        seen = (j <= i) & (i - j < window)
        logits = scale * torch.einsum("bihk,bjhk->bhij", q[:, i[:, 0]], k[:, j])
        decayed = logits + total[:, :, i] - total[:, :, None, j]
        weights = decayed.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("bhij,bjhv->bihv", weights, v[:, j]))
    return torch.cat(outputs, dim=1)


OP.register("chunked")(chunked.run)


def never_forget(layer: Any) -> None:
    """The gate's neutral value: log f = -exp(-1e4), which is zero."""
    nn.init.zeros_(layer.forget.weight)
    nn.init.constant_(layer.forget.bias, 1e4)


class ForgettingAttention(Attention, name="forgetting"):
    """Forgetting attention (FoX): softmax attention that fades by gates of the data.

    o_i = sum_{j <= i} softmax_j(<q_i, k_j> / sqrt(K) + F_i - F_j) v_j,
    F_i = sum_{l <= i} log f_l,   f_l = sigmoid(x_l w + b)

    where

    - q_i, k_j `[K]` and v_j `[V]` are the query, key and value of a head;
    - f_l is token l's forget gate per head, and w and b are learned.

    Its state is the cache of keys, values and gates. It grows with T, or with a window holds the
    last window - 1 tokens. Positions are what the gates make of them, so that `rotary` is null.

    Deviations from the paper: b starts at a half-life, not at zero. There is no shift of tokens in
    k and v, and no output norm (`qk_norm: rms` is the paper's, `out_gate: sigmoid` its Pro
    block's).
    """

    class Config(Attention.Config):
        rotary: float | None = None
        """There are no rotary positions by default (null), because the gates tell positions
        apart."""
        window: int | None = None
        """A query sees this many tokens, itself included; null is all of them."""
        half_life: float = 2048.0
        """A weight has halved after this many tokens, at the start of training."""

        def check(self) -> None:
            super().check()
            if self.window is not None:
                check_window(self.window)
            if self.half_life <= 0:
                raise SpecError(f"half_life: must be positive, got {self.half_life}")

    source = "Lin et al. 2025, arXiv 2503.02130"
    op = OP
    cases = (
        {"heads": 2, "half_life": 3.0},
        {"heads": 4, "kv_heads": 2, "window": 5, "half_life": 2.0, "out_gate": "silu"},
        {"heads": 3, "key_dim": 4, "window": 1, "rotary": 100.0, "qk_norm": "none"},
    )

    reductions = (
        Reduction({"heads": 2}, {"name": "softmax", "heads": 2, "rotary": None}, never_forget),
        Reduction(
            {"heads": 2, "window": 5},
            {"name": "sliding", "heads": 2, "window": 5, "rotary": None},
            never_forget,
        ),
    )

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__(dim, config)
        self.forget = nn.Linear(dim, self.heads)
        log_keep = -math.log(2) / config.half_life
        nn.init.constant_(self.forget.bias, log_keep - math.log(-math.expm1(log_keep)))  # logit

    def project(self, x: Tensor, state: State, qkv: QKV | None = None) -> dict[str, Tensor]:
        gate = self.forget(x)
        log_forget = F.logsigmoid(gate.to(accumulator_dtype(gate)))
        return {**super().project(x, state, qkv), "log_forget": log_forget}

    def attend(self, tensors: dict[str, Tensor], state: State) -> tuple[Tensor, State]:
        q, k, v, gate = tensors.values()
        return forgetting_attention(
            q, k, v, gate, window=self.config.window, state=state, impl=self.impl
        )

    def init_state(self, batch_size: int) -> State:
        return empty(super().init_state(batch_size), self.heads)

    def cached(self, T: int) -> int:
        return T if self.config.window is None else min(T, self.config.window - 1)

    def state_bytes(self, T: int) -> StateBytes:
        n = self.cached(T)
        memory, buffers = self.cache_bytes(n)
        return StateBytes(memory + 4 * n * self.heads, buffers)

    def rule_flops(self, T: int) -> float:
        window = self.config.window
        return self.pair_flops() * sum_of_seen(T, T if window is None else window) / max(1, T)

    def reach(self) -> Reach | None:
        return None if self.config.window is None else Reach(self.config.window - 1)

    def cautions(self, T: int) -> list[str]:
        window = self.config.window
        return [] if window is None else window_cautions(self.name, window, 0, T)
