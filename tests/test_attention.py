"""Attention ops against dense masks in float64, and what they reduce to."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from layerzoo.attention.differential import differential_attention
from layerzoo.attention.forgetting import forgetting_attention
from layerzoo.attention.latent import latent_attention
from layerzoo.attention.sink_logit import with_sink
from layerzoo.attention.sliding import sliding_attention
from layerzoo.attention.softmax import softmax_attention
from layerzoo.registry import build
from layerzoo.spec import SpecError

IMPLS = ("recurrent", "chunked")
IMPL = pytest.mark.parametrize("impl", IMPLS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def qkv(T: int, heads: int = 4, kv_heads: int = 2, K: int = 6, V: int = 6) -> list[Tensor]:
    shapes = ((heads, K), (kv_heads, K), (kv_heads, V))
    return [randn(2, T, *shape, seed=n).requires_grad_() for n, shape in enumerate(shapes)]


def repeated(k: Tensor, heads: int) -> Tensor:
    return k.repeat_interleave(heads // k.shape[2], 2)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    bias: Any = 0.0,
    scale: float | None = None,
    sink_logit: Tensor | None = None,
) -> Tensor:
    """Attention over all pairs, those that are not seen left out."""
    k, v = (repeated(t, q.shape[2]) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * torch.einsum("bihk,bjhk->bhij", q, k) + bias
    logits = logits.masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1)
    if sink_logit is not None:
        weights = weights * (logits.logsumexp(-1) - sink_logit[:, None]).sigmoid()[..., None]
    return torch.einsum("bhij,bjhv->bihv", weights, v)


def window_mask(T: int, window: int, sinks: int = 0) -> Tensor:
    i, j = torch.arange(T)[:, None], torch.arange(T)
    return (j <= i) & ((i - j < window) | (j < sinks))


def decay_bias(log_forget: Tensor) -> Tensor:
    """F_i - F_j, summed one by one."""
    B, T, H = log_forget.shape
    bias = log_forget.new_zeros(B, H, T, T)
    rows = []
    for i in range(T):
        bias = torch.zeros(B, H, T, dtype=log_forget.dtype)
        for j in range(i):
            bias[..., j] = log_forget[:, j + 1 : i + 1].sum(1)
        rows.append(bias)
    return torch.stack(rows, 2)


def in_pieces(op: Any, tensors: list[Tensor], sizes: list[int], **options: Any) -> Any:
    outputs, state = [], None
    for piece in zip(*(t.split(sizes, 1) for t in tensors), strict=True):
        o, state = op(*piece, state=state, **options)
        outputs.append(o)
    return torch.cat(outputs, 1), state


def agree(got: Tensor, want: Tensor, inputs: list[Tensor], tol: float = 1e-12) -> None:
    """Outputs and gradients."""
    torch.testing.assert_close(got, want, rtol=0, atol=tol)
    weights = torch.linspace(-1, 2, want.numel(), dtype=want.dtype).view_as(want)
    pairs = (
        torch.autograd.grad((o * weights).sum(), inputs, retain_graph=True) for o in (got, want)
    )
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol * max(1, float(b.abs().max())))


WINDOWS = [(1, 0), (1, 2), (5, 0), (16, 3), (30, 0), (47, 40), (48, 0), (300, 2)]


@IMPL
@pytest.mark.parametrize("T", [47, 64])
@pytest.mark.parametrize("window, sinks", WINDOWS)
def test_sliding_is_a_dense_mask(window: int, sinks: int, T: int, impl: str) -> None:
    tensors = qkv(T)
    options = {"window": window, "sinks": sinks, "impl": impl}
    want = dense(*tensors, window_mask(T, window, sinks))
    for sizes in ([T], [20, 1, 0, T - 21]):
        agree(in_pieces(sliding_attention, tensors, sizes, **options)[0], want, tensors)


def attention(window: int | None, sinks: int = 0) -> Any:
    """The op, and its mask of T tokens: without a window softmax attention."""
    if window is None:
        return softmax_attention, lambda T: window_mask(T, T)
    how = {"window": window, "sinks": sinks}
    return functools.partial(sliding_attention, **how), lambda T: window_mask(T, **how)


SINK_LOGIT = pytest.mark.parametrize(
    "window, sinks", [(None, 0), (1, 0), (1, 2), (5, 0), (16, 3), (47, 40), (300, 2)]
)


@IMPL
@pytest.mark.parametrize("K, V, scale", [(6, 6, None), (5, 19, 0.7), (13, 4, -0.3), (6, 6, 0.0)])
@SINK_LOGIT
def test_a_sink_logit_is_one_more_term_of_the_divisor(
    window: int | None, sinks: int, K: int, V: int, scale: float | None, impl: str
) -> None:
    T, (op, mask) = 47, attention(window, sinks)
    tensors = qkv(T, K=K, V=V)
    sink = (2 * randn(4)).requires_grad_()
    want = dense(*tensors, mask(T), scale=scale, sink_logit=sink)
    for sizes in ([T], [20, 1, 0, T - 21], [1, 1, T - 2]):
        got, state = in_pieces(op, tensors, sizes, scale=scale, sink_logit=sink, impl=impl)
        agree(got, want, [*tensors, sink])
        plain = in_pieces(op, tensors, sizes, scale=scale, impl=impl)[1]
        assert all(torch.equal(state[name], plain[name]) for name in plain)


@IMPL
@pytest.mark.parametrize("size", [1, 300])
@SINK_LOGIT
def test_a_sink_logit_of_minus_infinity_is_none(
    window: int | None, sinks: int, size: float, impl: str
) -> None:
    """Also where the other logits are very small, and in one head alone."""
    T, (op, mask) = 40, attention(window, sinks)
    tensors = qkv(T)
    sink = torch.tensor([-torch.inf, 0.5, -torch.inf, -1e20], dtype=torch.float64)
    sink.requires_grad_()
    q, k, v = tensors
    want = dense(size * q, size * k, v, mask(T), sink_logit=sink)
    got, _ = in_pieces(op, [size * q, size * k, v], [T - 1, 1], sink_logit=sink, impl=impl)
    agree(got, want, tensors, 1e-12 * size)
    (grad,) = torch.autograd.grad(got.square().sum(), sink)
    assert grad[[0, 2, 3]].tolist() == [0, 0, 0] and (grad[1] != 0) == (size == 1)


@pytest.mark.parametrize("logit", [3e4, -1e4, 6e4])
def test_a_sink_logit_may_be_as_large_as_a_number_of_16_bits(logit: float) -> None:
    """What q and the sink's key have of it is in the range of their dtype."""
    q, k, v = (randn(1, 3, 2, 16, seed=n).half() for n in range(3))
    q, k, _, scale = with_sink(q, k, v, torch.full((2,), logit), 16**-0.5)
    found = scale * (q[..., 16:].float() * k[:, :1, :, 16:].float()).sum(-1)
    torch.testing.assert_close(found, torch.full_like(found, logit), rtol=1e-3, atol=0)


@IMPL
@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 4])
def test_a_sink_logit_keeps_its_bits_in_low_precision(
    window: int | None, dtype: torch.dtype, autocast: bool, T: int, impl: str
) -> None:
    """Two logits that bfloat16 rounds to 7 and 7.03, and none, among logits of 7."""
    op, mask = attention(window)
    q, k, v = torch.ones(1, T, 3, 4), torch.ones(1, T, 3, 4), torch.ones(1, T, 3, 4)
    sink = torch.tensor([7.014, 7.017, -torch.inf], requires_grad=True)
    want = dense(q.double(), k.double(), v.double(), mask(T), scale=1.75, sink_logit=sink.double())
    (exact,) = torch.autograd.grad(want.sum(), sink)
    if not autocast:
        q, k, v = (t.to(dtype) for t in (q, k, v))
    with torch.autocast("cpu", dtype, enabled=autocast):
        got, _ = op(q, k, v, scale=1.75, sink_logit=sink, impl=impl)
    atol = 0.75 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)
    (grad,) = torch.autograd.grad(got.float().sum(), sink)
    torch.testing.assert_close(grad, exact, rtol=atol, atol=0)


@pytest.mark.parametrize("name", ["softmax", "sliding"])
def test_a_sink_logit_is_a_parameter(name: str) -> None:
    plain: Any = build(name, dim=8)
    layer: Any = build(name, dim=8, heads=2, kv_heads=1, sink_logit=-1.5)
    assert layer.sink_logit.tolist() == [-1.5, -1.5] and layer.sink_logit.requires_grad
    assert layer.state_dict().keys() - plain.state_dict().keys() == {"sink_logit"}
    x = torch.randn(1, 5, 8)
    layer.v.weight.data.copy_(torch.eye(8)[:4])
    layer.sink_logit.data.fill_(1e3)
    assert torch.equal(layer(x)[0], torch.zeros(1, 5, 8))  # a head that reads nothing


LONG_CASE = pytest.param(300, None, marks=pytest.mark.slow)  # of three blocks


@IMPL
@pytest.mark.parametrize("T, window", [(47, None), (47, 1), (47, 13), (150, 40), LONG_CASE])
def test_forgetting_is_a_dense_bias(T: int, window: int | None, impl: str) -> None:
    tensors = [*qkv(T), -randn(2, T, 4, seed=9).exp() / 4]
    tensors[3].requires_grad_()
    want = dense(*tensors[:3], window_mask(T, window or T), decay_bias(tensors[3]))
    for sizes in ([T], [20, 1, 0, T - 21]):
        got, _ = in_pieces(forgetting_attention, tensors, sizes, window=window, impl=impl)
        agree(got, want, tensors)


@IMPL
@pytest.mark.parametrize("window", [None, 7])
def test_gates_that_never_forget_are_attention(window: int | None, impl: str) -> None:
    tensors = qkv(150)
    gates = torch.zeros(2, 150, 4, dtype=torch.float64)
    got, _ = forgetting_attention(*tensors, gates, window=window, impl=impl)
    if window:
        agree(got, sliding_attention(*tensors, window=window, impl=impl)[0], tensors)
    else:
        agree(got, softmax_attention(*tensors, impl=impl)[0], tensors)


@IMPL
def test_a_gate_that_forgets_all_leaves_the_token_itself(impl: str) -> None:
    q, k, v = qkv(40)
    o, _ = forgetting_attention(q, k, v, torch.full((2, 40, 4), -1e4), impl=impl)
    torch.testing.assert_close(o, repeated(v, 4), rtol=0, atol=0)


@IMPL
def test_long_sums_of_gates_stay_exact(impl: str) -> None:
    """Sums reach -1e5, where a float32 steps by 0.008: neighbours must not be told apart by it.
    In pieces as well, whose sums start elsewhere."""
    T = 3000
    tensors = [t.detach().float() for t in qkv(T, heads=2, kv_heads=1, K=4, V=4)]
    gates = -(40 * randn(2, T, 2).abs()).float()
    gates[:, T - 8 :] /= 400
    wide = [t.double() for t in (*tensors, gates)]
    want, _ = forgetting_attention(*wide, impl="recurrent")
    for sizes in ([T], [T - 9, *[1] * 9]):
        got, state = in_pieces(forgetting_attention, [*tensors, gates], sizes, impl=impl)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)
        assert state["log_forget"].dtype == torch.float32


def test_forgetting_refuses_what_it_cannot_run() -> None:
    q, k, v = (t.detach() for t in qkv(5))
    gates = torch.zeros(2, 5, 4)
    with pytest.raises(SpecError, match="window: must be at least 1"):
        forgetting_attention(q, k, v, gates, window=0)
    with pytest.raises(SpecError, match=r"log_forget: shape \(2, 5, 2\) is not \[B, T, H\] with"):
        forgetting_attention(q, k, v, gates[..., :2])
    with pytest.raises(SpecError, match="4 query heads do not divide among 3 key heads"):
        forgetting_attention(q, k.repeat(1, 1, 2, 1)[:, :, :3], v, gates)
    with pytest.raises(SpecError, match="forgetting: half_life: must be positive, got 0"):
        build("forgetting", dim=8, half_life=0)


def test_forgetting_starts_at_its_half_life() -> None:
    layer = build("forgetting", dim=24, half_life=64.0)
    layer.forget.weight.data.zero_()
    tensors = layer.project(torch.randn(1, 5, 24), layer.init_state(1))
    torch.testing.assert_close(64 * tensors["log_forget"].exp().log2(), -torch.ones(1, 5, 4))


@IMPL
@pytest.mark.parametrize("name", ["softmax", "sliding", "forgetting"])
def test_grouped_heads_are_repeated_heads(name: str, impl: str) -> None:
    q, k, v = qkv(150)
    gates = -randn(2, 150, 4).abs()
    op: Any = {
        "softmax": lambda *a: softmax_attention(*a, impl=impl),
        "sliding": lambda *a: sliding_attention(*a, window=20, sinks=3, impl=impl),
        "forgetting": lambda *a: forgetting_attention(*a, gates, impl=impl),
    }[name]
    agree(op(q, k, v)[0], op(q, repeated(k, 4), repeated(v, 4))[0], [q, k, v])


def differential_inputs(T: int = 150) -> list[Tensor]:
    """Two maps of 4 heads over 2 key heads; values twice as wide as keys."""
    return qkv(T, heads=8, kv_heads=4)[:2] + qkv(T, heads=4, kv_heads=2, V=12)[2:]


@IMPL
@pytest.mark.parametrize("wide", [12, 6, 7])
def test_differential_is_the_difference_of_two_dense_maps(wide: int, impl: str) -> None:
    q, k, v = differential_inputs()
    v = v[..., :wide].detach().requires_grad_()
    mix = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    seen = window_mask(150, 150)
    first, second = (dense(q[:, :, h], k[:, :, g], v, seen) for h, g in HALVES)

    def op(*tensors: Tensor, **options: Any) -> Any:
        return differential_attention(*tensors, mix, impl=impl, **options)

    for sizes in ([150], [40, 1, 0, 109]):
        agree(in_pieces(op, [q, k, v], sizes)[0], first - mix * second, [q, k, v, mix])


HALVES = ((slice(4), slice(2)), (slice(4, 8), slice(2, 4)))


@IMPL
def test_differential_with_lambda_zero_is_its_first_map(impl: str) -> None:
    q, k, v = differential_inputs()
    zero = torch.zeros((), dtype=torch.float64)
    got, _ = differential_attention(q, k, v, zero, impl=impl)
    agree(got, softmax_attention(q[:, :, :4], k[:, :, :2], v, impl=impl)[0], [v])


def test_lambda() -> None:
    layer = build("differential", dim=16, heads=2, lambda_init=0.2)
    for name, p in layer.named_parameters():
        if name.startswith("lambda_"):
            p.data.fill_({"lambda_q1": 0.5, "lambda_k1": 0.25, "lambda_q2": 0.1}.get(name, 1.0))
    assert layer.key_dim == 4
    assert layer.mix().item() == pytest.approx(math.exp(0.5) - math.exp(0.4) + 0.2, abs=1e-6)
    o = layer.normalise(100 * torch.randn(3, 5, 2, 8))
    torch.testing.assert_close(o.square().mean(-1).sqrt(), torch.full((3, 5, 2), 0.8))


def test_differential_refuses_what_it_cannot_run() -> None:
    q, k, v = differential_inputs(5)
    with pytest.raises(SpecError, match=r"v: shape .* is not \[B, T, G, V\] with .* G = 2"):
        differential_attention(q, k, repeated(v, 4), torch.ones(()))
    with pytest.raises(SpecError, match="lambda_init: must be at least 0 and below 1, got 1"):
        build("differential", dim=8, lambda_init=1.0)
    with pytest.raises(
        SpecError, match=r"differential: heads .or give key_dim and value_dim.: 8 does"
    ):
        build("differential", dim=12, heads=4)


@IMPL
@pytest.mark.parametrize("R", [3, 40])
def test_latent_is_its_expanded_form(R: int, impl: str) -> None:
    """Whole, and token by token at the end, where small latents are read themselves."""
    T, H, K, V, P = 60, 3, 5, 4, 2
    shapes = ((T, H, K + P), (T, R), (T, P))
    tensors = [randn(2, *shape, seed=n).requires_grad_() for n, shape in enumerate(shapes)]
    up = randn(H, K + V, R).requires_grad_()
    q, c, r = tensors
    k = torch.einsum("btr,hkr->bthk", c, up[:, :K])
    k = torch.cat((k, r[:, :, None].expand(-1, -1, H, -1)), -1)
    want = dense(q, k, torch.einsum("btr,hvr->bthv", c, up[:, K:]), window_mask(T, T))

    def op(*tensors: Tensor, **options: Any) -> Any:
        return latent_attention(*tensors, up, impl=impl, **options)

    for sizes in ([T], [T - 8, *[1] * 4, 3, 0, 1]):
        agree(in_pieces(op, tensors, sizes)[0], want, [*tensors, up], 1e-11)


def test_latent_refuses_what_it_cannot_run() -> None:
    q, c, r = torch.randn(1, 3, 2, 6), torch.randn(1, 3, 4), torch.randn(1, 3, 2)
    with pytest.raises(SpecError, match=r"up: shape .* is not \[H, K\+V, R\] with .* K = 4"):
        latent_attention(q, c, r, torch.randn(2, 4, 4))
    with pytest.raises(SpecError, match="latent: rotary: needs an even rotary_dim, got 3"):
        build("latent", dim=8, rotary_dim=3)
    with pytest.raises(SpecError, match="latent: kv_rank: must be at least 1, got 0"):
        build("latent", dim=8, kv_rank=0)


@pytest.mark.parametrize(
    ("spec", "least"),
    [
        ({"name": "sliding", "heads": 2, "window": 8}, 9),
        ({"name": "sliding", "heads": 2, "window": 8, "sinks": 3}, 12),
        ({"name": "forgetting", "heads": 2, "window": 8}, 9),
        ({"name": "prefix", "heads": 2, "segment": 8, "children": ["gated_delta"]}, 9),
    ],
)
def test_a_window_without_effect_is_told(spec: Any, least: int) -> None:
    """From `least` tokens on the last one no longer sees the first as in full attention."""
    layer = build(spec, dim=8)
    assert layer.cautions(least) == []
    (line,) = layer.cautions(least - 1)
    assert line.startswith(f"{spec['name']}: a ") and "of 8 covers all of a sequence of" in line
    assert line.endswith(f"to {(least - 1) // 4} or less")


def test_full_attention_has_no_window_to_warn_of() -> None:
    assert build("forgetting", dim=8, heads=2).cautions(4) == []
    window = {"name": "sliding", "heads": 2, "window": 8}
    x = torch.randn(1, 9, 8)
    for sinks, same in ((0, False), (1, True)):
        layer = build({**window, "sinks": sinks}, dim=8)
        whole = build({"name": "softmax", "heads": 2}, dim=8)
        whole.load_state_dict(layer.state_dict())
        assert torch.allclose(layer(x)[0], whole(x)[0], atol=1e-6) == same
        assert (layer.cautions(9) != []) == same
