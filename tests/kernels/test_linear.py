"""The kernels of linear attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from layerzoo.kernels import launch, linear
from layerzoo.memories.linear.rule import OP, linear_attention
from layerzoo.ops import ImplError

from .conftest import DTYPES, OTHERS

GPU = torch.cuda.is_available()
WIDE = ("g", "state")
DECAYS = ("none", "constant", "scalar", "vector")
# B, T, H, K, V: one token; below a chunk; exactly chunks; chunks and a rest; T split
SHAPES = [(2, 1, 2, 4, 4), (1, 7, 2, 16, 3), (2, 64, 1, 5, 33)]
if GPU:
    SHAPES += [(1, 83, 2, 64, 64), (1, 300, 1, 16, 16), (2, 270, 1, 20, 16)]
    SHAPES += [(2, 64, 2, 64, 64), (2, 200, 3, 128, 128), (1, 300, 2, 64, 128)]
    SHAPES += [(1, 300, 2, 128, 64), (1, 150, 2, 256, 256)]
else:  # T is split at 128 and at 64
    SHAPES += [(1, 70, 2, 64, 16), (1, 150, 1, 16, 16), (2, 135, 1, 20, 16)]
# Without a GPU the dtypes take turns, so that each meets all shapes and all decays.
RUNS = [
    (shape, decay, dtype)
    for a, shape in enumerate(SHAPES)
    for b, decay in enumerate(DECAYS)
    for c, dtype in enumerate(DTYPES)
    if GPU or (a + b + c) % 2 == 0
]


def split_at(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Segments have this many tokens, 64 or 128, in place of 256, but on a GPU."""
    if GPU:
        return
    parts, shorter = linear.ops.parts, 256 // tokens

    def short(T: int, slots: int) -> tuple[int, int]:
        found, segments = parts(shorter * T, slots)
        return found // shorter, segments

    monkeypatch.setattr(linear.ops, "parts", short)


def tensors(
    shape: tuple[int, ...], decay: str, strength: str = "mild", state: bool = True
) -> dict[str, Tensor]:
    B, T, H, K, V = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    found = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, H, V)}
    if state:
        found["state"] = normal(B, H, K, V)
    size = {"none": None, "constant": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}[decay]
    if size:
        g = -torch.rand(size, generator=generator, dtype=torch.float64)
        factor = {"mild": 0.05, "strong": 20.0, "resets": 0.05}[strength]
        found["g"] = factor * g
        if strength == "resets":
            for value in (-30.0, -torch.inf):
                found["g"][torch.rand(size, generator=generator) < 0.05] = value
    return found


def call(scale: float = 0.3) -> Callable[..., Any]:
    def run(impl: str, q: Tensor, k: Tensor, v: Tensor, g: Any = None, state: Any = None) -> Any:
        return linear_attention(q, k, v, g, scale=scale, state=state, impl=impl)

    return run


@pytest.mark.parametrize(("shape", "decay", "dtype"), RUNS, indirect=["dtype"], ids=str)
def test_equals_recurrent(
    judge: Any, monkeypatch: Any, shape: tuple[int, ...], decay: str, dtype: torch.dtype
) -> None:
    split_at(monkeypatch, 128 if shape[0] == 1 else 64)
    if decay == "constant" and shape[1] > (256 if GPU else 128):  # one long sum: luck
        shape = (1, shape[1], 8, *shape[3:])
    judge(OP, call(), tensors(shape, decay), wide=WIDE)


@pytest.mark.parametrize("strength", ["strong", "resets"])
@pytest.mark.parametrize("decay", ["constant", "scalar", "vector"])
def test_strong_decays(judge: Any, monkeypatch: Any, decay: str, strength: str) -> None:
    split_at(monkeypatch, 64)
    heads = 8 if decay == "constant" else 1  # as above
    shape = (1, 290 if GPU else 90, heads, 16, 16)
    judge(OP, call(), tensors(shape, decay, strength), wide=WIDE)


@pytest.mark.parametrize("decay", DECAYS)
def test_without_a_state(judge: Any, decay: str) -> None:
    judge(OP, call(), tensors((1, 70 if GPU else 20, 2, 16, 16), decay, state=False), wide=WIDE)


def cast(xs: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(device, torch.float32 if name in WIDE else dtype) for name, x in xs.items()}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", [(2, 1, 3, 16, 16), (1, 1, 2, 5, 70)], ids=str)
def test_decoding(judge: Any, shape: tuple[int, ...], decay: str) -> None:
    judge(OP, call(), tensors(shape, decay), wide=WIDE, grad=False)


@pytest.mark.parametrize("decay", DECAYS)
def test_pieces_equal_the_whole(
    poison: None, monkeypatch: Any, device: torch.device, dtype: torch.dtype, decay: str
) -> None:
    """Across the kernels of one segment, of several, and of one token."""
    T = 300
    if not GPU and decay != "none":
        split_at(monkeypatch, 64)
        T = 90
    xs = cast(tensors((1, T, 2, 16, 20), decay), device, dtype)
    state = before = xs.pop("state")
    given, g = before.clone(), xs.pop("g", None)
    with torch.no_grad():
        whole, last = call()("triton", **xs, g=g, state=state)
        pieces = []
        for a, b in ((0, 1), (1, 1), (1, T - 11), (T - 11, T - 10), (T - 10, T)):
            part = {name: x[:, a:b] for name, x in xs.items()}
            gate = g if g is None or g.ndim == 1 else g[:, a:b]
            o, state = call()("triton", **part, g=gate, state=state)
            assert o.dtype == dtype and state.dtype == torch.float32
            pieces.append(o)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for made, want in ((torch.cat(pieces, 1), whole), (state, last)):
        assert float((made - want).norm()) <= tolerance * float(want.norm())
    assert torch.equal(before, given)


def test_no_tokens(device: torch.device) -> None:
    q, v, state = (
        torch.ones(s, device=device) for s in ((1, 0, 2, 3), (1, 0, 2, 4), (1, 2, 3, 4))
    )
    o, last = linear_attention(q, q, v, state=state, impl="triton")
    assert o.shape == v.shape and torch.equal(last, state)
    assert last.data_ptr() != state.data_ptr()


@pytest.mark.parametrize(
    "decay", ["scalar", *(pytest.param(other, marks=OTHERS) for other in ("none", "vector"))]
)
def test_compiles_as_one_graph(device: torch.device, decay: str) -> None:
    xs = cast(tensors((1, 20, 2, 16, 16), decay), device, torch.float32)
    leaves = [x.requires_grad_() for x in xs.values()]

    def loss(*values: Tensor) -> Tensor:
        o, state = call()("triton", **dict(zip(xs, values, strict=True)))
        return o.square().sum() + state.square().sum()

    made = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    grads = torch.autograd.grad(made, leaves)
    for got, want in zip(grads, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(got, want)


def test_operators_are_as_torch_wants_them(device: torch.device) -> None:
    xs = cast(tensors((1, 20, 2, 16, 16), "scalar"), device, torch.float32)
    given = (*(x.requires_grad_() for x in (xs["q"], xs["k"], xs["v"], xs["g"], xs["state"])), 0.5)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(linear.ops.forward, given, test_utils=checks)


def test_autocast_keeps_states_wide(device: torch.device) -> None:
    lower = torch.bfloat16 if GPU else torch.float16  # the interpreter has no bfloat16
    xs = cast(tensors((1, 40, 2, 16, 16), "scalar"), device, torch.float32)
    want, last = call()("recurrent", **xs)
    with torch.autocast(device.type, lower):
        o, state = call()("triton", **{**xs, "q": xs["q"].to(lower)})
    assert (o.dtype, state.dtype) == (lower, torch.float32)
    for made, exact in ((o, want), (state, last)):
        assert float((made.float() - exact).norm()) <= 2e-2 * float(exact.norm())


def test_has_no_second_derivative(device: torch.device) -> None:
    xs = cast(tensors((1, 8, 1, 16, 16), "none"), device, torch.float32)
    q = xs.pop("q").requires_grad_()
    o, _ = call()("triton", q, **xs)
    (grad,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_attention_backward"):
        torch.autograd.grad(grad.sum(), q)


def test_a_frozen_state_and_an_unused_output(device: torch.device) -> None:
    xs = cast(tensors((1, 40, 1, 16, 16), "scalar"), device, torch.float32)
    for name in ("q", "g"):
        leaf = xs[name].requires_grad_()
        o, state = call()("triton", **xs)
        made = torch.autograd.grad((state if name == "g" else o).sum(), leaf)[0]
        o, state = call()("recurrent", **xs)
        want = torch.autograd.grad((state if name == "g" else o).sum(), leaf)[0]
        torch.testing.assert_close(made, want, rtol=1e-4, atol=1e-5)
        leaf.requires_grad_(False)


@pytest.mark.parametrize(("K", "V", "reason"), [(257, 16, "K = 257"), (16, 400, "V = 400")])
def test_says_what_it_does_not_take(device: torch.device, K: int, V: int, reason: str) -> None:
    q, v = torch.ones(1, 2, 1, K, device=device), torch.ones(1, 2, 1, V, device=device)
    with pytest.raises(ImplError, match=f"cannot run: {reason} is more than the 256 channels"):
        linear_attention(q, q, v, impl="triton")
    with pytest.raises(ImplError, match="float32, bfloat16 or float16, not in float64"):
        linear_attention(q.double(), q.double(), v.double(), impl="triton")


def test_splits_long_sequences_of_few_heads() -> None:
    on = launch.TARGETS["sm_90"]
    for heads, slots in ((1, 64), (16, 33), (128, 4), (1024, 1)):
        assert linear.scan.settings(64, 64, 2, on, heads)["slots"] == slots
    assert linear.ops.parts(100, 64) == (100, 1) and linear.ops.parts(1000, 1) == (1000, 1)
    assert linear.ops.parts(1000, 64) == (256, 4) and linear.ops.parts(65536, 64) == (1024, 64)
