"""Op.select, and the ops at the edges of their arguments: resets, strong decays, no writes."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import layerzoo.kernels
from layerzoo import SpecError, build, get_layer, list_layers
from layerzoo.attention.sliding import sliding_attention
from layerzoo.attention.softmax import softmax_attention
from layerzoo.memories.common.matrix import MatrixMemory
from layerzoo.memories.delta import delta_rule
from layerzoo.memories.linear import linear_attention
from layerzoo.ops import ImplError, Op
from layerzoo.testing.precision import DRAWS, check_precision, errors

T, H, K, V = 40, 2, 4, 5
IMPLS = ("recurrent", "chunked")


@pytest.fixture
def op() -> Op:
    op = Op("doubling")
    op.register("recurrent")(lambda q, *, by=2: by * q)
    op.register("chunked", upcast=False)(lambda q, *, by=2: q * by)
    return op


class Kernel(ModuleType):
    """A fake layerzoo.kernels.doubling."""

    def __init__(self, reason: str | None) -> None:
        super().__init__("layerzoo.kernels.doubling")
        self.reason, self.asked = reason, []

    def supports(self, *args: Any, **kwargs: Any) -> str | None:
        self.asked.append((args, kwargs))
        return self.reason

    def run(self, q: Tensor, *, by: int = 2) -> str:
        return f"triton by {by}"


def install(monkeypatch: pytest.MonkeyPatch, reason: str | None) -> Kernel:
    kernel = Kernel(reason)
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    monkeypatch.setattr(layerzoo.kernels, "doubling", kernel, raising=False)
    return kernel


def test_a_named_impl_runs_and_is_recorded(op: Op) -> None:
    q = torch.ones(2)
    assert op.used == set() and op.available() == IMPLS
    for n, impl in enumerate(IMPLS, 1):
        assert op(impl, q, by=3).tolist() == [3, 3]
        assert op.select(impl, q)[0] == impl
        assert op.used == set(IMPLS[:n])


def test_auto_chooses_the_portable_one_on_a_cpu(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = install(monkeypatch, None)
    op("auto", torch.ones(2))
    assert op.used == {"chunked"} and kernel.asked == []
    del op.impls["chunked"]
    assert op.select("auto", torch.ones(2))[0] == "recurrent"


def test_auto_takes_the_kernel_on_a_gpu(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it supports the arguments; a GPU of AMD says is_cuda, too."""
    q: Any = SimpleNamespace(is_cuda=True)
    assert op.select("auto", q)[0] == "chunked"  # there is no kernel
    kernel = install(monkeypatch, None)
    assert op.select("auto", q) == ("triton", kernel.run)
    kernel.reason = "K = 7 is not a power of two"
    assert op.select("auto", q)[0] == "chunked"
    with pytest.raises(ImplError, match="cannot run: K = 7"):
        op.select("triton", q)


def test_an_unknown_impl_lists_what_there_is(op: Op) -> None:
    with pytest.raises(ImplError, match="doubling: no impl 'fused'; it has auto, recurrent, ch"):
        op("fused", torch.ones(2))
    del op.impls["chunked"]
    with pytest.raises(ImplError, match=r"no impl 'chunked'; it has auto, recurrent$"):
        op("chunked", torch.ones(2))  # never another one instead
    assert op.used == set()


def test_triton_without_a_kernel_says_so(op: Op) -> None:
    with pytest.raises(ImplError, match="doubling: impl 'triton' cannot run: it has no Triton ke"):
        op("triton", torch.ones(2))
    assert op.used == set()


def test_triton_runs_where_the_kernel_supports_it(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, q = install(monkeypatch, None), torch.ones(2)
    assert op.available() == (*IMPLS, "triton")
    assert op("triton", q, by=3) == "triton by 3"
    assert op.used == {"triton"} and kernel.asked == [((q,), {"by": 3})]


def test_triton_gives_the_reason_why_not(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "K = 7 is not a power of two")
    with pytest.raises(ImplError, match="cannot run: K = 7 is not a power of two"):
        op("triton", torch.ones(2))
    assert op.used == set()


@pytest.mark.parametrize("missing", ["triton", "numpy_of_the_kernel"])
def test_a_kernel_that_does_not_import(
    op: Op, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def fail(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)

    monkeypatch.setattr("layerzoo.ops.importlib.import_module", fail)
    if missing == "triton":
        with pytest.raises(ImplError, match="triton is not installed"):
            op("triton", torch.ones(2))
    else:  # a broken kernel is not a missing one
        with pytest.raises(ModuleNotFoundError, match=missing):
            op("triton", torch.ones(2))


def test_upcast_widens_inside_and_narrows_the_output() -> None:
    op, seen = Op("seen"), []
    op.register("recurrent")(lambda q, *, state: (seen.append(q @ state) or q, state))
    q = torch.ones(2, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = op("recurrent", q, state=torch.ones(2, 2))
    assert (o.dtype, state.dtype, seen[0].dtype) == (torch.bfloat16, torch.float32, torch.float32)
    o, state = op("recurrent", q, state=torch.ones(2, 2, dtype=torch.float64))
    assert (o.dtype, state.dtype, seen[1].dtype) == (torch.bfloat16, torch.float64, torch.float64)


def test_layer_impl_is_checked() -> None:
    layer = build("linear", dim=24)
    with pytest.raises(SpecError, match="impl 'chunk' is unknown; did you mean 'chunked'"):
        layer.impl = "chunk"
    layer.impl = "triton"
    with pytest.raises(
        ImplError, match="linear_attention: impl 'triton' cannot run: it computes in"
    ):
        layer.double()(torch.randn(1, 3, 24).double())


def arguments(rule: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random inputs, unit keys, a state that is not empty."""
    q, k = torch.randn(2, 2, T, H, K, dtype=dtype)
    k = k / k.norm(dim=-1, keepdim=True)
    v, state = torch.randn(2, T, H, V, dtype=dtype), torch.randn(2, H, K, V, dtype=dtype)
    beta = {"beta": torch.rand(2, T, H, dtype=dtype)} if rule == "delta" else {}
    return {"q": q, "k": k, "v": v, "state": state, **beta}


def call(rule: str, impl: str, args: dict[str, Tensor], log_decay: Tensor | None) -> Any:
    fn: Any = {"linear": linear_attention, "delta": delta_rule}[rule]
    return fn(**args, log_decay=log_decay, impl=impl)


RULES = pytest.mark.parametrize("rule", ["linear", "delta"])
IMPL = pytest.mark.parametrize("impl", IMPLS)


@RULES
@IMPL
@pytest.mark.parametrize("shape", [(), (2,), (H, K), (2, T), (2, T, H, V), (2, T, 1), (1, T, H)])
def test_a_decay_of_another_shape_is_refused(rule: str, impl: str, shape: tuple[int, ...]) -> None:
    if shape == (2,):
        shape = (H + 1,)
    with pytest.raises(SpecError, match=r"log_decay: shape \(.*\) is none of \[H\], \[B, T, H\]"):
        call(rule, impl, arguments(rule), torch.zeros(shape))


def decays(kind: str, shape: tuple[int, ...]) -> Tensor:
    g = -torch.rand(shape, dtype=torch.float64)
    if kind == "resets":  # some tokens forget everything, the chunk's first and last among them
        g[:, [0, 3, 15, 16, 20, 31, 32, 39]] = -torch.inf
    elif kind == "resets everywhere":
        g = torch.full(shape, -torch.inf, dtype=torch.float64)
    else:
        g = 30 * (g - 1)  # between e^-30 and e^-60 a step
    return g


@RULES
@pytest.mark.parametrize("shape", [(2, T, H), (2, T, H, K)], ids=["scalar", "vector"])
@pytest.mark.parametrize("kind", ["resets", "resets everywhere", "strong"])
def test_resets_and_strong_decays(rule: str, shape: tuple[int, ...], kind: str) -> None:
    args, g = arguments(rule), decays(kind, shape)
    weights = [torch.randn(2, T, H, V).double(), torch.randn(2, H, K, V).double()]
    results = []
    for impl in IMPLS:
        leaves = {name: x.clone().requires_grad_() for name, x in args.items()}
        decay = g.clone().requires_grad_()
        outputs = call(rule, impl, leaves, decay)
        loss = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
        grads = torch.autograd.grad(loss, [*leaves.values(), decay])
        results.append([x.detach() for x in (*outputs, *grads)])
    for n, (recurrent, chunked) in enumerate(zip(*results, strict=True)):
        assert torch.isfinite(recurrent).all() and torch.isfinite(chunked).all(), n
        tol = 1e-11 * max(1.0, float(recurrent.abs().max()))
        torch.testing.assert_close(
            chunked, recurrent, rtol=0, atol=tol, msg=lambda m, n=n: f"{n}: {m}"
        )


@RULES
@pytest.mark.parametrize("shape", [(2, T, H), (2, T, H, K)], ids=["scalar", "vector"])
def test_float32_survives_a_reset_amid_mild_decays(rule: str, shape: tuple[int, ...]) -> None:
    """A cumulative sum over resets must not cost the mild decays after them their digits."""
    args, g = arguments(rule), decays("resets", shape)
    reference, made = [], []
    for draw in range(DRAWS):
        scaled = {name: x * (1 - draw / 256) for name, x in args.items()}
        o, _ = call(rule, "recurrent", scaled, g)
        single = {name: x.float() for name, x in scaled.items()}
        for impl, found in (("recurrent", reference), ("chunked", made)):
            found.append(errors({"o": call(rule, impl, single, g.float())[0]}, {"o": o}))
    check_precision(made, reference)


@IMPL
@RULES
def test_a_reset_forgets_the_past(rule: str, impl: str) -> None:
    args, g = arguments(rule), torch.zeros(2, T, H, dtype=torch.float64)
    g[:, 20] = -torch.inf
    o, state = call(rule, impl, args, g)
    late = {name: x[:, 20:] for name, x in args.items() if name != "state"}
    late["state"] = torch.zeros_like(args["state"])
    fresh, last = call(rule, impl, late, None)
    torch.testing.assert_close(o[:, 20:], fresh, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


@IMPL
def test_neutral_writes_keep_the_state(impl: str) -> None:
    """beta = 0 with log_decay = 0 is a token that the memory does not see."""
    args = arguments("delta")
    zero = torch.zeros(2, T, H, dtype=torch.float64)
    o, state = call("delta", impl, {**args, "beta": zero}, zero)
    torch.testing.assert_close(state, args["state"], rtol=0, atol=1e-13)
    want = torch.einsum("bthk,bhkv->bthv", args["q"], args["state"])
    torch.testing.assert_close(o, want, rtol=0, atol=1e-12)
    some = args["beta"].clone()
    some[:, ::2] = 0
    _, state = call("delta", impl, {**args, "beta": some}, zero)
    seen = {name: x if name == "state" else x[:, 1::2] for name, x in args.items()}
    torch.testing.assert_close(state, call("delta", impl, seen, None)[1], rtol=0, atol=1e-12)


@IMPL
@RULES
def test_all_forms_of_a_decay_agree(rule: str, impl: str) -> None:
    args, constant = arguments(rule), -torch.rand(H, dtype=torch.float64)
    scalar = constant.expand(2, T, H)
    want = call(rule, impl, args, constant)
    for same in (scalar, scalar.unsqueeze(-1).expand(-1, -1, -1, K)):
        for got, wanted in zip(call(rule, impl, args, same), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    for got, wanted in zip(
        call(rule, impl, args, 0 * scalar), call(rule, impl, args, None), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


MATRIX = [name for name in list_layers() if issubclass(get_layer(name), MatrixMemory)]


@pytest.mark.parametrize("name", MATRIX)
def test_a_matrix_memory_reads_after_its_write(name: str) -> None:
    """What a token reads is what a query alone reads from the state that the token leaves."""
    for case in get_layer(name).cases:
        layer = build(name, dim=24, **case).double()
        assert isinstance(layer, MatrixMemory)
        if hasattr(layer, "skip"):
            torch.nn.init.zeros_(layer.skip)  # what bypasses the memory
        q, write = layer.project(torch.randn(2, 9, 24, dtype=torch.float64))
        o, state = layer.mix(q, write, layer.init_state(2))
        read = layer.read(q[:, -1:], layer.inside(state))
        torch.testing.assert_close(read, o[:, -1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", [softmax_attention, sliding_attention])
def test_heads_must_divide(attention: Any) -> None:
    q, kv = torch.randn(1, 3, 4, 2), torch.randn(1, 3, 3, 2)
    window = {"window": 2} if attention is sliding_attention else {}
    with pytest.raises(SpecError, match="4 query heads do not divide among 3 key heads"):
        attention(q, kv, kv, **window)


def test_sliding_refuses_impossible_windows() -> None:
    x = torch.randn(1, 3, 2, 2)
    with pytest.raises(SpecError, match="window: must be at least 1"):
        sliding_attention(x, x, x, window=0)
    with pytest.raises(SpecError, match="sinks: must not be negative"):
        sliding_attention(x, x, x, window=2, sinks=-1)
