"""Multi-head latent attention: its op, over a cache of latents, and its layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from layerzoo.annotations import tensor
from layerzoo.attend import CACHE, append, attend_causal, attend_one, empty_cache
from layerzoo.layer import State, StateBytes
from layerzoo.nn import RMSNorm
from layerzoo.ops import Op
from layerzoo.shell import QKV, next_position
from layerzoo.signature import Signature
from layerzoo.spec import SpecError

from .common import Attention

if TYPE_CHECKING:
    from jaxtyping import Float

OP = Op("latent_attention")


SIGNATURE = Signature(CACHE | {"k": tensor("B n P"), "v": tensor("B n R")})


@SIGNATURE
def latent_attention(
    q: Float[Tensor, "B T H K+P"],
    latent: Float[Tensor, "B T R"],
    position_key: Float[Tensor, "B T P"],
    up: Float[Tensor, "H K+V R"],
    *,
    scale: float | None = None,
    state: State = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], State]:
    """Attention whose keys and values are made of one cached latent per token.

    o_i = sum_{j <= i} softmax_j(scale <q_i, (U_k c_j, r_j)>) U_v c_j

    where

    - c_j `[R]` is token j's latent, which all heads share;
    - r_j `[P]` is its rotated position key, which all heads share;
    - U_k `[K, R]` and U_v `[V, R]` are the head's two parts of `up`;
    - q_i `[K + P]` is the head's query.

    Args:
        q: The queries: K channels that meet the keys of the head, then P that meet the position
            key.
        latent: The latents c, which are cached.
        position_key: The position keys r, which are cached.
        up: For each head K rows that turn a latent into a key, then V that turn it into a value.
        scale: The logits are multiplied by this number; None is (K + P)^-1/2.
        state: The cache {k, v, position} of position keys and latents; None is empty. It grows
            with T.
        impl: Run this implementation: auto, recurrent, chunked or triton.

    Returns:
        The read-outs in q's dtype, and the cache with the new tokens.

    Raises:
        SpecError: An argument has another shape.
        ImplError: The impl cannot run here.

    Source: DeepSeek-AI 2024, arXiv 2405.04434, sec. 2.1.2 and 2.1.3.
    """
    if not is_compiling():
        SIGNATURE.check(locals())
    state = empty_cache(position_key, latent) if state is None else state
    k, v = append(state["k"], position_key), append(state["v"], latent)
    o = OP(impl, q, v, k, up, scale=q.shape[-1] ** -0.5 if scale is None else scale)
    return o, {"k": k, "v": v, "position": state["position"] + q.shape[1]}


def expand(c: Tensor, r: Tensor, up: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """The keys `[B, n, H, K + P]` and values `[B, n, H, V]` of all heads."""
    H, channels, _ = up.shape
    made = (c @ up.flatten(0, 1).mT).unflatten(-1, (H, channels))
    k, v = made.split((K, channels - K), -1)
    return torch.cat((k, r[:, :, None].expand(-1, -1, H, -1)), -1), v


@OP.register("recurrent")
def _recurrent(q, c, r, up, *, scale):
    k, v = expand(c, r, up, q.shape[3] - r.shape[2])
    past = k.shape[1] - q.shape[1]
    outputs = []
    for t in range(q.shape[1]):
        end = past + t + 1
        outputs.append(attend_one(q[:, t], k[:, :end], v[:, :end], scale))
    return torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])


@OP.register("chunked", transformable=True)
def _chunked(q, c, r, up, *, scale):
    """Few queries after many tokens go to the latents (absorbed): q U_k meets c itself, one key
    head for all, and U_v is applied to what was read. Many make their keys and values first."""
    K = q.shape[3] - r.shape[2]
    new, total, (_, channels, R) = q.shape[1], c.shape[1], up.shape
    expanded = total * R * channels + new * total * (channels + r.shape[2])
    absorbed = new * R * channels + new * total * (2 * R + r.shape[2])
    if expanded <= absorbed or new == 0:
        k, v = expand(c, r, up, K)
        return attend_causal(q, k, v, scale)
    content, position = q.split((K, r.shape[2]), -1)
    content = torch.einsum("bthk,hkr->bthr", content, up[:, :K])
    keys = torch.cat((c, r), -1)[:, :, None]
    # The keys are their values, too: kernels want both of one width.
    o = attend_causal(torch.cat((content, position), -1), keys, keys, scale)
    return torch.einsum("bthr,hvr->bthv", o[..., :R], up[:, K:])


class LatentAttention(Attention, name="latent"):
    """Multi-head latent attention (DeepSeek-V2): keys and values are made of a small latent.

    c_j = norm(x_j W_c),   r_j = rotary(x_j W_r),   k_j = (U_k c_j, r_j),   v_j = U_v c_j,
    q_i = (a_i, rotary(b_i)),   (a_i, b_i) = norm(x_i W_a) W_b or x_i W_b,
    o_i = sum_{j <= i} softmax_j(<q_i, k_j> / sqrt(K + P)) v_j

    where

    - c_j, of kv_rank channels, is the latent, and r_j, of rotary_dim = P channels, the position
      key;
    - k_j, v_j, q_i, U_k and U_v are those of a head, and its a_i has K channels;
    - all W and U are learned, and W_a is there with a q_rank.

    The state is the cache of c and r alone: kv_rank + rotary_dim numbers a token, whatever the
    number of heads. A decoded token reads the latents themselves.

    There is no qk_norm: it would make the keys of all cached tokens again for every new token. The
    latents are normalised instead.
    """

    class Config(Attention.Config):
        qk_norm: Literal["none"] = "none"
        """q and k have no norm; the latents are normalised instead."""
        key_bias: Literal[False] = False
        """Keys have no bias, because they are made of the latent."""
        kv_rank: int = 64
        """The latent has R channels."""
        q_rank: int | None = None
        """Queries are made of a latent of this many channels; null makes them of x."""
        rotary_dim: int = 32
        """The position key has P channels. key_dim does not count them."""

        reasons: ClassVar[Any] = {
            "qk_norm": "its norms are those of the latents, for keys are not made for every token",
            "key_bias": "keys are made of the latent",
        }

        def check(self) -> None:
            super().check()
            for name in ("kv_rank", "q_rank", "rotary_dim"):
                value = getattr(self, name)
                if value is not None and value < 1:
                    raise SpecError(f"{name}: must be at least 1, got {value}")
            if self.kv_heads is not None:
                raise SpecError("kv_heads: all heads share one latent; leave it out")

    source = "DeepSeek-AI 2024, arXiv 2405.04434"
    op = OP
    cases = (
        {"heads": 2, "kv_rank": 7, "rotary_dim": 4},
        {"heads": 3, "key_dim": 5, "value_dim": 7, "kv_rank": 6, "q_rank": 9, "rotary_dim": 2},
        {"heads": 4, "kv_rank": 8, "rotary_dim": 3, "rotary": None, "out_gate": "sigmoid"},
    )

    def make_projections(self, dim: int, queries: int, keys: int, values: int) -> None:
        c, K = self.config, self.key_dim
        c.check_channels(c.rotary_dim, "rotary_dim")
        if c.q_rank:
            self.q_down = nn.Linear(dim, c.q_rank, bias=False)
            self.q_norm = RMSNorm(c.q_rank, eps=1e-6)
        self.q = nn.Linear(c.q_rank or dim, queries * (K + c.rotary_dim), bias=False)
        self.down = nn.Linear(dim, c.kv_rank + c.rotary_dim, bias=False)
        self.norm = RMSNorm(c.kv_rank, eps=1e-6)
        self.up = nn.Linear(c.kv_rank, keys * K + values * self.value_dim, bias=False)

    def project(self, x: Tensor, state: State, qkv: QKV | None = None) -> dict[str, Tensor]:
        """Project x `[B, T, D]`, which follows the tokens of `state`, to queries, latent and
        position key."""
        c = self.config
        q = self.q(self.q_norm(self.q_down(x)) if c.q_rank else x)
        content, turned = q.unflatten(-1, (self.heads, -1)).split((self.key_dim, c.rotary_dim), -1)
        latent, key = self.down(x).split((c.kv_rank, c.rotary_dim), -1)
        key = key[:, :, None]
        if c.rotary:
            start = next_position(state)
            turned, key = c.rotate(turned, start), c.rotate(key, start)
        q = torch.cat((content, turned), -1)
        # A view would keep the whole tensor in memory, and in a saved state.
        return {"q": q, "latent": self.norm(latent), "position_key": key[:, :, 0].contiguous()}

    def attend(self, tensors: dict[str, Tensor], state: State) -> tuple[Tensor, State]:
        up = self.up.weight.unflatten(0, (self.heads, -1))
        q, latent, key = tensors.values()
        return latent_attention(q, latent, key, up, state=state, impl=self.impl)

    def init_state(self, batch_size: int) -> State:
        empty = self.down.weight.new_empty(batch_size, 0, self.down.out_features)
        return empty_cache(empty[..., self.config.kv_rank :], empty[..., : self.config.kv_rank])

    def state_bytes(self, T: int) -> StateBytes:
        return StateBytes(4 * T * (self.config.kv_rank + self.config.rotary_dim), buffers=8)

    def rule_flops(self, T: int) -> float:
        pair = self.key_dim + self.value_dim + self.config.rotary_dim
        return self.heads * pair * (T + 1)
