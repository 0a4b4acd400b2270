"""The kernels of sliding_attention against the op's other implementations."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layerzoo.attention.sliding.rule import OP, cached_sinks, sliding_attention
from layerzoo.kernels import launch, sliding
from layerzoo.ops import ImplError

from .conftest import DTYPES

GPU = torch.cuda.is_available()
D = 64 if GPU else 16


def cached(start: int, window: int, sinks: int) -> int:
    return cached_sinks(start, window, sinks) + min(window - 1, start)


def tensors(
    B: int = 1, T: int = 8, H: int = 2, G: int | None = None, K: int = D, V: int = D, past: int = 0
) -> dict[str, Tensor]:
    """float64 q, k, v, with `past` more tokens in k and v."""
    generator = torch.Generator().manual_seed(B + T + H + K)
    G = H if G is None else G
    shapes = {"q": (B, T, H, K), "k": (B, past + T, G, K), "v": (B, past + T, G, V)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def attend(window: int, sinks: int = 0, start: int = 0, scale: float = 0.3) -> Callable[..., Any]:
    def call(impl: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return OP(impl, q, k, v, window=window, sinks=sinks, start=start, scale=scale)

    return call


L = 300 if GPU else 150
CASES = {
    "window": ({"T": L, "H": 2 if GPU else 1}, {"window": 70}),
    "inner blocks": ({"T": 260, "H": 1}, {"window": 140}),
    "inner blocks and sinks": ({"T": 220, "H": 1}, {"window": 100, "sinks": 5, "start": 9}),
    "window of one": ({"T": 40}, {"window": 1}),
    "narrow window": ({"T": L, "H": 1}, {"window": 5}),
    "longer than the sequence": ({"T": 90, "H": 1}, {"window": 1000}),
    "sinks": ({"T": L, "H": 1}, {"window": 33, "sinks": 4}),
    "many sinks": ({"T": L, "H": 1}, {"window": 20, "sinks": 90}),
    "more sinks than tokens": ({"T": 30, "H": 1}, {"window": 4, "sinks": 40}),
    "sinks apart": ({"T": 70, "H": 1}, {"window": 40, "sinks": 5, "start": 300}),
    "sinks leave the window": ({"T": 70, "H": 1}, {"window": 40, "sinks": 9, "start": 43}),
    "sinks in the window": ({"T": 70, "H": 1}, {"window": 80, "sinks": 9, "start": 20}),
    "start without sinks": ({"T": 50, "H": 1}, {"window": 30, "start": 100}),
    "grouped heads": ({"T": 60, "H": 4, "G": 2, "B": 2}, {"window": 40, "sinks": 3}),
    "odd channels": ({"T": 50, "H": 2, "K": 5, "V": 19}, {"window": 20, "sinks": 2}),
    "narrow values": ({"T": 40, "H": 1, "K": 2 * D, "V": 16}, {"window": 20}),
    "negative scale": ({"T": 20, "H": 1}, {"window": 8, "scale": -0.4}),
    "no scale": ({"T": 20, "H": 1}, {"window": 8, "sinks": 2, "scale": 0.0}),
    "decode": ({"T": 1, "B": 2}, {"window": 150, "start": 400}),
    "decode with sinks": ({"T": 1}, {"window": 130, "sinks": 5, "start": 400}),
    "decode, first token": ({"T": 1, "B": 2}, {"window": 9, "sinks": 3}),
    "decode grouped heads": ({"T": 1, "H": 6, "G": 2}, {"window": 90, "sinks": 70, "start": 99}),
    "few tokens": ({"T": 5, "H": 4, "G": 2}, {"window": 70, "sinks": 3, "start": 71}),
    "decode odd channels": ({"T": 2, "K": 5, "V": 19}, {"window": 40, "sinks": 2, "start": 77}),
}
if GPU:
    CASES["wide heads"] = ({"T": L, "K": 128, "V": 128}, {"window": 130, "sinks": 4})
    CASES["widest heads"] = ({"T": L, "K": 256, "V": 256}, {"window": 130, "sinks": 4})
    CASES["decode wide heads"] = ({"T": 1, "K": 128, "V": 128}, {"window": 130, "start": 400})


def marks(name: str, dtype: torch.dtype) -> Any:
    """In float32 tiles are small in the interpreter, and "window" and "sinks in the window" have
    inner blocks already: longer ones are a second look."""
    again = not GPU and dtype == torch.float32 and name.startswith("inner blocks")
    return pytest.mark.slow if again else ()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param(name, dtype, marks=marks(name, dtype)) for dtype in DTYPES for name in CASES],
    indirect=["dtype"],
    ids=str,
)
def test_against_the_other_implementations(
    name: str, dtype: torch.dtype, judge: Callable[..., None]
) -> None:
    shape, options = CASES[name]
    start, sinks = options.get("start", 0), options.get("sinks", 0)
    past = cached(start, options["window"], sinks)
    judge(OP, attend(**options), tensors(**shape, past=past))


@pytest.mark.parametrize("sinks", [0, 3])
def test_pieces_equal_the_whole(sinks: int, poison: None, device: torch.device) -> None:
    x = {n: t.to(device, torch.float32) for n, t in tensors(T=60, H=4, G=2, B=2).items()}

    def call(first: int, last: int, state: Any) -> Any:
        piece = {name: t[:, first:last] for name, t in x.items()}
        return sliding_attention(**piece, window=9, sinks=sinks, state=state, impl="triton")

    whole, _ = call(0, 60, None)
    state, outputs = None, []
    edges = [0, 1, 2, 3, 6, 10, 30, 30, 49, 50, 51, 60]
    for first, last in itertools.pairwise(edges):
        o, state = call(first, last, state)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("T", [1, 40])
def test_a_cache_is_read_where_it_lies(T: int, poison: None, device: torch.device) -> None:
    """Slices of longer caches, with another layout, and of one tensor of all projections."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, T, 4, 2 * D, generator=generator).to(device)[..., ::2]
    kv = torch.randn(2, 2, 100, 3 * D, generator=generator).to(device)
    k, v = (kv[:, :, 7 : 60 + T, D * i : D * (i + 1)].transpose(1, 2) for i in (0, 2))
    call = attend(20, 4, start=600)
    torch.testing.assert_close(
        call("triton", q, k, v), call("chunked", q, k, v), rtol=1e-5, atol=1e-5
    )


def test_no_tokens(device: torch.device) -> None:
    x = {name: t.to(device, torch.float32) for name, t in tensors(T=0, past=4).items()}
    assert attend(5, start=4)("triton", **x).shape == (1, 0, 2, D)


def test_reasons_to_refuse(device: torch.device) -> None:
    x = {name: t.to(device) for name, t in tensors(T=4).items()}
    with pytest.raises(ImplError, match="not in float64"):
        attend(3)("triton", **x)
    x = {name: t.float() for name, t in tensors(T=4, K=300).items()}
    with pytest.raises(ImplError, match="up to 256 channels, got K = 300 and V ="):
        attend(3)("triton", **{name: t.to(device) for name, t in x.items()})
    x = {name: t.to(device, torch.float32) for name, t in tensors(T=4, past=2).items()}
    with pytest.raises(ImplError, match="the cache lacks sinks"):
        attend(5, sinks=4, start=5)("triton", **x)


def test_a_sink_logit_goes_to_chunked(device: torch.device) -> None:
    x = {name: t.to(device, torch.float32) for name, t in tensors(T=4).items()}
    how: Any = {"window": 3, "sink_logit": torch.zeros(2, device=device)}
    with pytest.raises(ImplError, match="'triton' cannot run: it takes no sink logit; use"):
        sliding_attention(**x, **how, impl="triton")
    want, _ = sliding_attention(**x, **how, impl="chunked")
    torch.testing.assert_close(sliding_attention(**x, **how)[0], want, rtol=0, atol=0)


def leaves(device: torch.device, **shape: int) -> list[Tensor]:
    return [t.to(device, torch.float32).requires_grad_() for t in tensors(**shape).values()]


def test_compiled(device: torch.device) -> None:
    x = leaves(device, T=40, H=2)
    run = functools.partial(sliding.run, window=9, sinks=2, start=0, scale=0.3)
    want, got = run(*x), torch.compile(run, fullgraph=True, backend="aot_eager")(*x)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(want)
    for a, b in zip(
        *(torch.autograd.grad((o * weights).sum(), x) for o in (got, want)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_autocast_changes_nothing(device: torch.device) -> None:
    x = leaves(device, T=20, H=2)
    want = torch.autograd.grad(attend(9, 2)("triton", *x).square().sum(), x)
    with torch.autocast(device.type, torch.bfloat16):
        got = torch.autograd.grad(attend(9, 2)("triton", *x).square().sum(), x)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_gradients_have_no_gradients(device: torch.device) -> None:
    x = leaves(device, T=20, H=2)
    o = attend(9)("triton", *x)
    grads = torch.autograd.grad(o.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grads[0].sum().backward()


def test_keys_of_another_dtype(device: torch.device) -> None:
    q, k, v = (t.to(device, torch.float32) for t in tensors(T=20).values())
    o = attend(9)("triton", q, k.half(), v.half())
    assert torch.equal(o, attend(9)("triton", q, k.half().float(), v.half().float()))


@pytest.mark.parametrize("arch", list(launch.TARGETS))
def test_settings_exist_for_all_sizes(arch: str) -> None:
    for kernel in ("forward", "backward_q", "backward_kv", "backward_sinks", "decode"):
        for size in (16, 64, 128, 256):
            for dtype in (torch.float32, torch.bfloat16):
                s = sliding.settings(kernel, size, dtype, launch.TARGETS[arch])
                assert min(s.BM, s.BN) >= 16 and s.warps in (4, 8)
                assert kernel != "decode" or s.BM == sliding.FEW
