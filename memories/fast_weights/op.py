"""The public op of the fast weights."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from layerzoo.annotations import form_of
from layerzoo.ops import Op, accumulator_dtype
from layerzoo.signature import FRACTION, Match, Signature
from layerzoo.spec import SpecError

from . import engine, recurrent
from .compiled import uncompiled
from .engine import Watch
from .rule import Rule
from .state import WeightsState, init_state

if TYPE_CHECKING:
    from jaxtyping import Float

OP = Op("fast_weights")


SIGNATURE = Signature(momentum=FRACTION, decay=FRACTION)


@SIGNATURE
def fast_weights(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    weights: tuple[Float[Tensor, "H _ _"] | Float[Tensor, "B H _ _"], ...],
    *,
    spec: Rule,
    lr: Float[Tensor, "B T H"] | Float[Tensor, "B T H _"],
    momentum: Float[Tensor, "B T H"] | None = None,
    decay: Float[Tensor, "B T H"] | None = None,
    row: Float[Tensor, " C"] | None = None,
    layer_norm: tuple[Float[Tensor, "H V"], Float[Tensor, "H V"]] | None = None,
    state: WeightsState | None = None,
    impl: str = "auto",
    checkpoint: bool = False,
    compiled: bool = False,
    watch: Watch | None = None,
) -> tuple[Float[Tensor, "B T H V"], WeightsState]:
    """A network M_W is trained on the pairs (k, v) while they are read: o_t = M_(W_t)(q_t).

    With `update: token`, for the tokens j = 1, 2, .. of a mini-batch,

        S_j = momentum_j S_(j-1) - lr_j g_j
        U_j = (1 - decay_j) U_(j-1) + S_j,   A_j = (1 - decay_j) A_(j-1)
        W_j = A_j W_0 + row_j U_j,           o_j = M_(W_j)(q_j)

    and with `update: chunk`, where every token reads W_0,

        U_j = U_(j-1) - lr_j g_j,   A_j = (1 - decay_j) A_(j-1)

    and when the mini-batch is full S = mean(momentum) S + U,   W = A W_0 + direction(S),

    where

    - W_0 are the weights from before the mini-batch, whose last W is the next one's W_0;
    - g_j is the gradient of the objective of M(k_j) against v_j at W_0;
    - S is the momentum, which goes on from mini-batch to mini-batch;
    - U is what the mini-batch has added so far, and A what is left of W_0: 0 and 1 at its start;
    - direction is the optimiser's.

    A map phi of `spec.forgetting` acts between mini-batches. With place `end` the next W_0 is
    phi(W). With `start` tokens read W_0, but gradients are taken at phi(W_0), and A multiplies
    phi(W_0). With `view` both use phi(W_0), and A multiplies W_0.

    Args:
        q: The queries.
        k: The keys.
        v: The values.
        weights: The initial weights of every matrix, `[H, I, O]` or `[B, H, I, O]`, as
            `spec.network.shapes(K, V)`; with biases I + 1 rows, the last of which is the bias.
        spec: The rule, whose axes are named as in a config.
        lr: The finished rates, `[B, T, H]`, or `[B, T, H, M]` with one for each of M matrices.
        momentum: In [0, 1]; given if and only if the rule has it.
        decay: In [0, 1]; given if and only if the rule has it.
        row: `[mini_batch]`, a factor of the token's place in its mini-batch (TTT), with `token`.
        layer_norm: Weight and bias; given if and only if the network has a LayerNorm.
        state: The state of an earlier call; None starts from `weights`. It is enough to go on at
            any token. (`weights` still give `norm` its target.)
        impl: Run this implementation: auto, recurrent, chunked or triton.
        checkpoint: If true, less is kept for the backward pass, and computed again.
        compiled: If true, the work of a mini-batch is compiled, once for a rule and shapes (half a
            minute). A mini-batch that a call holds a part of, as in decoding, is not compiled.
        watch: It is called at the end of every mini-batch, see diagnostics.py.

    Returns:
        The read-outs in q's dtype, and the state in float32 (float64 for float64 input), see
            state.py.

    Raises:
        SpecError: Gates or weights do not fit the rule.
        ImplError: The impl cannot run here, or a compiler is missing.

    Sources: TTT, Sun et al. 2024, arXiv 2407.04620, and Titans, Behrouz et al. 2025, 2501.00663
    (token); LaCT, Zhang et al. 2025, 2505.23884, and AllMem, 2602.13680 (chunk); Miras, 2504.13173
    (huber, lp, lq, kl).
    """
    if not is_compiling():
        SIGNATURE.check(locals())
    B = len(k)
    check_arguments(spec, k, v, weights, lr, momentum, decay, row, layer_norm)
    if not is_compiling() and state is not None:
        H, K, V = *k.shape[2:], v.shape[3]
        Match("fast_weights", B=B).fit(state_form(spec, H, K, V), state, "state")
    if state is None:
        wide = accumulator_dtype(q, k, v)
        state = init_state(spec, tuple(w.to(wide) for w in weights), B)
    given: Any = {"state": state, "checkpoint": checkpoint, "compiled": compiled, "watch": watch}
    lr = lr.unsqueeze(-1) if lr.dim() == 3 else lr
    gates = (lr, momentum, decay)
    return dispatch(
        impl, q, k, v, *gates, weights, spec=spec, row=row, layer_norm=layer_norm, **given
    )


def dispatch(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Float[Tensor, "B T H M"],
    momentum: Tensor | None,
    decay: Tensor | None,
    weights: tuple[Tensor, ...],
    *,
    spec: Rule,
    row: Tensor | None,
    layer_norm: tuple[Tensor, Tensor] | None,
    state: WeightsState,
    checkpoint: bool = False,
    compiled: bool = False,
    watch: Watch | None = None,
) -> tuple[Tensor, WeightsState]:
    """`fast_weights` of arguments that fit, as a layer's do."""
    initial, norm = per_row(weights, layer_norm, len(q))
    return OP(
        impl,
        *(q, k, v, lr, momentum, decay, row, norm, initial),
        rule=spec,
        state=state,
        checkpoint=checkpoint,
        compiled=compiled,
        watch=watch,
    )


READ_SIGNATURE = Signature()


@READ_SIGNATURE
def read_fast_weights(
    q: Float[Tensor, "B T H K"],
    weights: tuple[Float[Tensor, "H _ _"] | Float[Tensor, "B H _ _"], ...],
    *,
    spec: Rule,
    row: Float[Tensor, " C"] | None = None,
    layer_norm: tuple[Float[Tensor, "H V"], Float[Tensor, "H V"]] | None = None,
    state: WeightsState,
) -> Float[Tensor, "B T H V"]:
    """o = M_W(q) with the weights that the last token of a state read; nothing is written.
    Arguments as in `fast_weights`."""
    if not is_compiling():
        READ_SIGNATURE.check(locals())
    initial, norm = per_row(weights, layer_norm, len(q))
    return READ("chunked", q, row, norm, initial, rule=spec, state=state)


@functools.cache
def state_form(rule: Rule, H: int, K: int, V: int) -> Any:
    shapes = [(H, i + rule.network.bias, o) for i, o in rule.network.shapes(K, V)]
    return form_of(init_state(rule, tuple(torch.empty(shape) for shape in shapes), 0))


def per_row(weights: tuple[Tensor, ...], layer_norm: Any, B: int) -> tuple[Any, Any]:
    """Initial weights `[B H, I, O]` and LayerNorm parameters `[B H, 1, V]`."""
    initial = tuple(w.expand(B, *w.shape[-3:]).flatten(0, 1) for w in weights)
    return initial, layer_norm and tuple(x.unsqueeze(1).repeat(B, 1, 1) for x in layer_norm)


def check_arguments(
    rule: Rule,
    k: Tensor,
    v: Tensor,
    weights: tuple[Tensor, ...],
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    row: Tensor | None,
    layer_norm: Any,
) -> None:
    """Raises SpecError where the arguments do not fit the rule."""
    K = k.shape[3]
    V, network = v.shape[-1], rule.network
    if network.residual and K != V:
        raise SpecError(f"network: residual needs K = V, got {K} and {V}")
    given = {
        "momentum": (momentum, rule.has_momentum, f"optimiser '{rule.optimiser.name}'"),
        "decay": (decay, rule.has_decay, f"forgetting '{rule.forgetting.name}'"),
        "layer_norm": (layer_norm, network.layer_norm, f"network '{network.name}'"),
    }
    for name, (value, wanted, option) in given.items():
        if (value is not None) != wanted:
            verb = "needs" if wanted else "has no"
            raise SpecError(f"{name}: {option} of this rule {verb} {name}")
    shapes = [(i + network.bias, o) for i, o in network.shapes(K, V)]
    if [tuple(w.shape[-2:]) for w in weights] != shapes:
        got = [tuple(w.shape[-2:]) for w in weights]
        raise SpecError(f"weights: shapes {got} are not {shapes} of network '{network.name}'")
    if lr.shape[3:] not in ((), (1,), (len(weights),)):
        raise SpecError(
            f"lr: shape {tuple(lr.shape)} is neither [B, T, H] nor [B, T, H, matrices]"
        )
    if row is not None and rule.update == "chunk":
        raise SpecError(
            "row: weighs the tokens inside a mini-batch, which update 'chunk' does not"
        )
    if row is not None and row.shape != (rule.mini_batch,):
        raise SpecError(f"row: shape {tuple(row.shape)} is not [{rule.mini_batch}]")


OP.register("recurrent")(recurrent.run)
OP.register("chunked")(
    uncompiled(engine.run, reason="its loop over mini-batches would be unrolled")
)
READ = Op("read_fast_weights")
READ.register("chunked", transformable=True)(engine.read_only)
