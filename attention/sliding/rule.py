"""Sliding-window attention with sinks: its op over a bounded cache, and its layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_compiling

from layerzoo.attend import CACHE, append, attend_one, empty_cache
from layerzoo.layer import Reach, Reduction, State, StateBytes
from layerzoo.ops import Op
from layerzoo.signature import Signature
from layerzoo.spec import SpecError

from ..common import Attention
from ..sink_logit import remove_sink, sink_parameter
from . import chunked
from .chunked import Pair

if TYPE_CHECKING:
    from jaxtyping import Float

OP = Op("sliding_attention", kernel="sliding")


SIGNATURE = Signature(CACHE)


@SIGNATURE
def sliding_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    sink_logit: Float[Tensor, " H"] | None = None,
    state: State = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], State]:
    """Each query reads the values of the last tokens, and of the first ones, which are the sinks.

    o_i = sum_j p_ij v_j,   p_ij = e^(scale <q_i, k_j>) / sum_l e^(scale <q_i, k_l>)

    and with a sink logit p_ij = e^(scale <q_i, k_j>) / (e^sink + sum_l e^(scale <q_i, k_l>)),

    where

    - j and l run over the tokens up to i with i - j < window or j < sinks;
    - q_i, k_j `[K]` and v_j `[V]` are a query, a key and a value of one head;
    - sink is the sink logit of the head.

    Args:
        q: The queries. Query head h reads key and value head h // (H / G).
        k: The keys.
        v: The values.
        window: A query sees this many tokens, itself included. It may exceed the sequence.
        sinks: So many of the first tokens are always visible (StreamingLLM).
        scale: The logits are multiplied by this number; None is K^-1/2.
        sink_logit: This logit of each query head belongs to no token; None is no such logit.
        state: The cache {k, v, position} of the sinks and the last window - 1 tokens; None is
            empty.
        impl: Run this implementation: auto, recurrent, chunked or triton, which takes no sink
            logit.

    Returns:
        The read-outs in q's dtype, and the cache after the new tokens.

    Raises:
        SpecError: window < 1, sinks < 0, an argument has another shape, or G does not divide H.
        ImplError: The impl cannot run here.

    Source: Beltagy et al. 2020, arXiv 2004.05150 (window); Xiao et al. 2023, 2309.17453 (sinks);
    OpenAI 2025, 2508.10925, section 2.2 (sink logit).
    """
    if not is_compiling():
        SIGNATURE.check(locals())
    check_window(window, sinks)
    state = empty_cache(k, v) if state is None else state
    start = int(state["position"])
    end = start + q.shape[1]
    k, v = append(state["k"], k), append(state["v"], v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    how = {"window": window, "sinks": sinks, "start": start, "scale": scale}
    o = OP(impl, q, k, v, **how, sink_logit=sink_logit)
    k, v = trim(k, v, end, window, sinks)
    return o, {"k": k, "v": v, "position": state["position"] + q.shape[1]}


def trim(k: Tensor, v: Tensor, end: int, window: int, sinks: int) -> Pair:
    """Drop the tokens of a cache that no later query sees, after `end` tokens of the sequence.

    What stays are the sinks that have left the window, then the last window - 1 tokens.
    """
    head, tail = cached_sinks(end, window, sinks), min(window - 1, end)
    if head + tail >= k.shape[1]:
        return k, v
    k, v = (torch.cat((t[:, :head], t[:, t.shape[1] - tail :]), 1) for t in (k, v))
    return k, v


def check_window(window: int, sinks: int = 0) -> None:
    if window < 1:
        raise SpecError(f"window: must be at least 1 (it counts the current token), got {window}")
    if sinks < 0:
        raise SpecError(f"sinks: must not be negative, got {sinks}")


def window_cautions(name: str, window: int, sinks: int, T: int) -> list[str]:
    """A caution if the window hides nothing in sequences of T tokens."""
    if window + sinks < T:
        return []
    return [
        f"{name}: a window of {window} covers all of a sequence of {T} tokens, so this is full "
        f"attention; set window to {max(1, T // 4)} or less"
    ]


def cached_sinks(position: int, window: int, sinks: int) -> int:
    """How many sinks have left the window before `position`. The cache keeps those in front."""
    return max(0, min(sinks, position - (window - 1)))


@OP.register("recurrent")
def _recurrent(q, k, v, *, window, sinks, start, scale, sink_logit=None):
    apart = cached_sinks(start, window, sinks)
    past = k.shape[1] - q.shape[1] - apart  # cached tokens that are not sinks apart
    position = torch.cat((torch.arange(apart), torch.arange(start - past, start + q.shape[1])))
    outputs = []
    for t in range(q.shape[1]):
        i = start + t
        seen = (position <= i) & ((i - position < window) | (position < sinks))
        seen = seen.nonzero().squeeze(-1).to(k.device)
        outputs.append(attend_one(q[:, t], k[:, seen], v[:, seen], scale, sink_logit=sink_logit))
    return torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])


def chunk_form(q, k, v, *, window, sinks=0, scale=None, size=16):
    """`sliding_attention` of a whole sequence, `size` queries at a time, in plain terms.

    o_i = sum_j softmax_j(scale <q_i, k_j>) v_j over the tokens j that query i sees: one mask says
    which.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    tokens = torch.arange(q.shape[1])
    outputs = []
    for start in range(0, len(tokens), size):
        i, j = tokens[start : start + size, None], tokens[: start + size]
        seen = (j <= i) & ((i - j < window) | (j < sinks))
        logits = scale * torch.einsum("bihk,bjhk->bhij", q[:, i[:, 0]], k[:, j])
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("bhij,bjhv->bihv", weights, v[:, j]))
    return torch.cat(outputs, dim=1)


OP.register("chunked", upcast=False, transformable=True)(chunked.run)


def sum_of_seen(n: int, top: int) -> int:
    """The sum of min(j, top) over j = 1..n."""
    rising = max(0, min(n, top))
    return rising * (rising + 1) // 2 + max(0, n - top) * top


class SlidingAttention(Attention, name="sliding"):
    """Sliding-window softmax attention with sinks.

    o_i = sum_j softmax_j(<q_i, k_j> / sqrt(K)) v_j

    where

    - j runs over the tokens up to i with i - j < window or j < sinks;
    - q_i, k_j `[K]` and v_j `[V]` are the query, key and value of a head, after norm and rotation.

    The window counts the current token. The state is bounded: it holds the last window - 1 keys
    and values, and the sinks. Unlike StreamingLLM, rotary positions count tokens of the sequence
    and not of the cache.
    """

    class Config(Attention.Config):
        window: int = 64
        """A query sees this many tokens, itself included."""
        sinks: int = 0
        """So many of the first tokens are always visible."""
        sink_logit: float | None = None
        """A learned logit per head, which belongs to no token, starts at this value. The divisor
        of the softmax becomes e^sink + sum_j e^<q_i, k_j> (GPT-OSS, 2508.10925). null means no
        logit."""

        def check(self) -> None:
            super().check()
            check_window(self.window, self.sinks)

    source = "Beltagy et al. 2020, arXiv 2004.05150"
    op = OP
    cases = (
        {"heads": 2, "window": 5},
        {"heads": 4, "kv_heads": 2, "window": 4, "sinks": 3, "out_gate": "sigmoid"},
        {"heads": 3, "key_dim": 5, "value_dim": 7, "window": 1, "rotary": None, "qk_norm": "l2"},
        {"heads": 4, "kv_heads": 2, "window": 5, "sinks": 2, "sink_logit": 0.5},
    )
    reductions = (
        Reduction(
            {"heads": 2, "window": 5, "sinks": 2, "sink_logit": 0.0},
            {"name": "sliding", "heads": 2, "window": 5, "sinks": 2},
            remove_sink,
        ),
    )

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__(dim, config)
        self.sink_logit = sink_parameter(config.sink_logit, self.heads)

    def attend(self, tensors: dict[str, Tensor], state: State) -> tuple[Tensor, State]:
        c, (q, k, v) = self.config, tensors.values()
        how = {"window": c.window, "sinks": c.sinks, "sink_logit": self.sink_logit}
        return sliding_attention(q, k, v, **how, state=state, impl=self.impl)

    def state_bytes(self, T: int) -> StateBytes:
        c = self.config
        return self.cache_bytes(cached_sinks(T, c.window, c.sinks) + min(c.window - 1, T))

    def rule_flops(self, T: int) -> float:
        c = self.config
        # The window, and the sinks behind it.
        seen = sum_of_seen(T, c.window) + sum_of_seen(T - c.window, c.sinks)
        return self.pair_flops() * seen / max(1, T)

    def reach(self) -> Reach:
        return Reach(self.config.window - 1, self.config.sinks)

    def cautions(self, T: int) -> list[str]:
        return window_cautions(self.name, self.config.window, self.config.sinks, T)
