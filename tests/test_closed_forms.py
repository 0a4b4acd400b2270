"""The ops of the closed-form memories as programs: derivatives, both impls at every length, cut
and layout, float32 over long sequences, memory. What they compute: test_closed_form_rules.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layerzoo.memories.common import chunks
from layerzoo.memories.delta import delta_rule
from layerzoo.memories.linear import linear_attention
from layerzoo.memories.mesa import chunked as mesa_file
from layerzoo.memories.mesa import mesa

Args = dict[str, Any]
OPS: dict[str, Callable[..., Any]] = {"linear": linear_attention, "delta": delta_rule}
IMPL = pytest.mark.parametrize("impl", ["recurrent", "chunked"])
DECAYS = ("none", "constant", "scalar", "vector")
FORMS = [(rule, decay, {}) for rule in OPS for decay in DECAYS]
FORMS += [("mesa", decay, {"steps": n}) for decay in ("none", "scalar") for n in (2, None)]
FORMS.append(("mesa", "scalar", {"steps": 5}))


def table(*more: tuple[str, str, Args]) -> Any:
    rows = [*FORMS, *more]
    ids = ["-".join(map(str, (rule, decay, *fields.values()))) for rule, decay, fields in rows]
    return pytest.mark.parametrize("rule, decay, options", rows, ids=ids)


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


def unit(*shape: int) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def arguments(
    rule: str, decay: str = "none", B: int = 2, T: int = 40, H: int = 3, K: int = 3, V: int = 2
) -> Args:
    """Random inputs in float64: unit keys, beta up to 2 (mesa: 1), a state that is not empty."""
    shape = {"none": None, "constant": (H,), "scalar": (B, T, H), "vector": (B, T, H, K)}[decay]
    args: Args = {"q": torch.randn(B, T, H, K).double(), "k": unit(B, T, H, K)}
    args["v"] = torch.randn(B, T, H, V).double()
    args["log_decay"] = None if shape is None else -0.3 * rand(*shape)
    if rule != "linear":
        args["beta"] = rand(B, T, H) * (2 if rule == "delta" else 1)
    state = torch.randn(B, H, K, V).double()
    if rule != "mesa":
        return {**args, "state": state}
    past = unit(B, H, K, K)
    return {**args, "ridge": 0.2 + rand(H, K), "kk": past.mT @ past, "kv": state}


def run(rule: str, args: Args, impl: str = "chunked", **options: Any) -> tuple[Tensor, ...]:
    """The op's output and its state or states."""
    args = dict(args)
    if rule != "mesa":
        return OPS[rule](**args, impl=impl, **options)
    state = (args.pop("kk"), args.pop("kv")) if "kk" in args else None
    o, states = mesa(**args, state=state, impl=impl, **options)
    return o, *states


def tensors(args: Args) -> dict[str, Tensor]:
    return {name: x for name, x in args.items() if x is not None}


def close(got: Sequence[Tensor], want: Sequence[Tensor], tol: float = 1e-12) -> None:
    """Equal to `tol` of the largest entry."""
    for n, (x, y) in enumerate(zip(got, want, strict=True)):
        assert x.shape == y.shape and torch.isfinite(x).all(), n
        atol = tol * max(1e-3, float(y.detach().abs().max()))
        torch.testing.assert_close(x, y, rtol=0, atol=atol, msg=lambda m, n=n: f"{n}: {m}")


@table(("mesa", "none", {"steps": 3}), ("mesa", "scalar", {"steps": 30}))
def test_gradients_are_derivatives(rule: str, decay: str, options: Args) -> None:
    args = arguments(rule, decay, H=1)
    names = list(tensors(args))

    def fn(*xs: Tensor) -> tuple[Tensor, ...]:
        return run(rule, {**args, **dict(zip(names, xs, strict=True))}, **options)

    leaves = [args[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(fn, leaves, atol=1e-7, rtol=1e-6, fast_mode=True)


def outcome(
    rule: str,
    args: Args,
    impl: str = "chunked",
    layout: Callable[[Tensor], Tensor] = lambda x: x,
    weight: Callable[[Tensor], Tensor] = lambda x: x,
    leaves: Sequence[str] = (),
    outputs: Sequence[int] = (),
    **options: Any,
) -> list[Tensor]:
    """Output, states, and the gradients of `leaves` (default all) by way of `outputs` (default
    all), with inputs stored as `layout` and output gradients as `weight`."""
    leaf = {name: x.clone() for name, x in tensors(args).items()}
    wanted = [leaf[name].requires_grad_() for name in leaves or leaf if name in leaf]
    stored = {name: layout(x) if x.dim() > 2 else x for name, x in leaf.items()}
    results = run(rule, {**args, **stored}, impl, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [weight(torch.randn(x.shape, generator=generator).double()) for x in results]
    through = [n for n in outputs or range(len(results)) if n < len(results)]
    through = [n for n in through if results[n].requires_grad]  # else its gradient is zero
    grads = [torch.zeros_like(x) for x in wanted]
    if through:
        pairs = zip(*((results[n], weights[n]) for n in through), strict=True)
        grads = torch.autograd.grad(next(pairs), wanted, next(pairs), materialize_grads=True)
    for name, x in leaf.items():
        assert x.equal(args[name]), f"{name} was written into"
    return [x.detach() for x in (*results, *grads)]


def cut(monkeypatch: pytest.MonkeyPatch, chunk: int, tokens: int) -> None:
    """Chunks of `chunk` tokens and segments of `tokens` (of all rows)."""
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    monkeypatch.setattr(chunks, "SEGMENT", tokens)
    monkeypatch.setattr(mesa_file, "SOLVED", tokens)


CUTS = ((16, 64), (16, 2 * 6 * 16), (32, 64), (32, 2 * 6 * 32), (64, 4096))


@table()
@pytest.mark.parametrize("T", [1, 15, 16, 17, 32, 33, 64, 65, 100])
def test_recurrent_equals_chunked(
    rule: str, decay: str, options: Args, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the sequence is cut into chunks, and the chunks into segments."""
    if rule != "mesa":
        options = {"scale": 0.7}
    args = arguments(rule, decay, T=T)
    want = outcome(rule, args, "recurrent", **options)
    for chunk, tokens in CUTS if T > 16 else CUTS[:1]:
        cut(monkeypatch, chunk, tokens)
        close(outcome(rule, args, "chunked", **options), want, 1e-9)


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    lambda x: torch.stack((x, x), -1)[..., 0],
    lambda x: x[:, :, :1].expand_as(x),
    lambda x: x[:1].expand_as(x),
    lambda x: x.flatten()[0].expand_as(x),  # output gradients as o.sum() has them
)
SHAPES = ({"B": 1, "H": 1, "K": 1, "V": 1}, {"B": 1, "K": 5, "V": 2}, {"H": 1, "K": 2, "V": 5}, {})


def copied(layout: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: layout(x).contiguous()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@table(("mesa", "constant", {"steps": 2}))
def test_any_shape_and_layout(
    rule: str, decay: str, options: Args, shape: Args, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of inputs and of output gradients. (The tokens make whole chunks: padding would copy.)"""
    cut(monkeypatch, 16, 96)
    args = arguments(rule, decay, T=32, **shape)
    close(outcome(rule, args, **options), outcome(rule, args, "recurrent", **options), 1e-9)
    for layout, weight in itertools.pairwise(LAYOUTS):
        got = outcome(rule, args, layout=layout, weight=weight, **options)
        copies = {"layout": copied(layout), "weight": copied(weight)}
        close(got, outcome(rule, args, **copies, **options))


LEAVES = (["state", "kk", "kv"], ["q"], ["v"], ["log_decay", "v"], ["k", "beta", "ridge"])


@pytest.mark.parametrize("outputs", [[0], [1], [2, 1]], ids=str)
@pytest.mark.parametrize("leaves", LEAVES, ids="-".join)
@pytest.mark.parametrize("rule", ["linear", "delta", "mesa"])
def test_gradients_of_some_inputs_by_way_of_some_outputs(
    rule: str, leaves: list[str], outputs: list[int]
) -> None:
    args, options = arguments(rule, "scalar", T=34), {"leaves": leaves, "outputs": outputs}
    if rule == "mesa":
        options["steps"] = 2
    both = [outcome(rule, args, impl, **options) for impl in ("recurrent", "chunked")]
    close(both[1], both[0], 1e-9)


@table()
def test_no_gradient_needed(rule: str, decay: str, options: Args) -> None:
    args = arguments(rule, decay)
    want = run(rule, args, **options)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            close(run(rule, args, **options), want, 0.0)


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
@table()
def test_no_token(rule: str, decay: str, options: Args, impl: str) -> None:
    args = arguments(rule, decay, T=0)
    o, *states, grad = outcome(rule, args, impl, leaves=["state", "kv"], **options)
    assert o.shape == (2, 0, 3, 2)
    close(states, [args[name] for name in ("state", "kk", "kv") if name in args], 0.0)
    assert grad.shape == states[-1].shape and (grad != 0).all()


def long_decay(kind: str, *shape: int) -> Tensor:
    """Log decays: near 1, -1e-7 to -1e-5; near 0, -20 to -100 and a few resets; mixed, mostly near
    1, and in between mild ones and now and then near 0."""
    near_1, near_0 = -(10 ** (2 * rand(*shape) - 7)), -20 - 80 * rand(*shape)
    near_0[rand(*shape) < 0.02] = -torch.inf
    if kind != "mixed":
        return near_1 if kind == "near 1" else near_0
    pick = rand(*shape)
    return torch.where(pick < 0.9, near_1, torch.where(pick < 0.97, -rand(*shape), near_0))


def by_head(name: str, x: Tensor) -> Tensor:
    return x.movedim({"state": 1, "kk": 1, "kv": 1, "ridge": 0}.get(name, 2), 0).flatten(1)


LONG = [(rule, decay, 16384) for rule in OPS for decay in ("none", "scalar", "vector")]
LONG += [("mesa", "none", 4096), ("mesa", "scalar", 4096)]


@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "rule, decay, T, kinds",
    [(*row, ["near 1", "mixed"]) for row in LONG]
    + [(*row[:2], row[2] // 16, ["near 0", "near 0"]) for row in LONG if row[1] != "none"],
)
def test_float32_over_a_long_sequence(
    rule: str, decay: str, T: int, kinds: list[str], times: int
) -> None:
    """Relative error of each head's output, state and gradients against float64. Each head has a
    decay of its own kind; beta is up to 1 in the first, up to 2 in the other (mesa: 1)."""
    T *= times
    args = arguments(rule, decay, B=1, T=T, H=2, K=16, V=16)
    if decay != "none":
        channels = args["log_decay"].shape[3:]
        args["log_decay"] = torch.stack([long_decay(kind, 1, T, *channels) for kind in kinds], 2)
    if rule == "delta":
        args["beta"][:, :, 0] /= 2
    if rule == "mesa":
        args["ridge"] += 0.5
    options = {"steps": 10} if rule == "mesa" else {}
    states = ["kk", "kv"] if rule == "mesa" else ["state"]
    single = {name: x.float() for name, x in tensors(args).items()}
    results = [outcome(rule, {**args, **x}, **options) for x in (single, args)]
    for name, x, y in zip(["o", *states, *single], *results, strict=True):
        assert x.dtype == torch.float32 and torch.isfinite(x).all(), name
        error = by_head(name, x.double() - y).norm(dim=1) / by_head(name, y).norm(dim=1)
        assert error.max() < (1e-4 if rule == "mesa" else 1e-5), f"{name}: {error.tolist()}"


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that operations have seen or made, and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.ever = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            ref = StorageWeakRef(storage)
            if ref.cdata not in self.storages:
                self.storages[ref.cdata] = (ref, storage.nbytes())
                self.ever += storage.nbytes()
        if self.ever > self.peak:  # what is dead is still in it
            self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        self.storages = {n: s for n, s in self.storages.items() if not s[0].expired()}
        self.ever = sum(size for _, size in self.storages.values())
        return self.ever


@pytest.mark.parametrize(
    "rule, without, kept, peak",
    [("linear", 1.75, 2.5, 3.9), ("delta", 1.9, 3.7, 5.3), ("mesa", 3.5, 3.9, 5.4)],
)
@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
def test_memory_is_linear_in_the_tokens(
    rule: str,
    decay: str,
    without: float,
    kept: float,
    peak: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a call takes at most where no gradient is wanted, what one keeps for its gradient, and
    what that takes at most, as multiples of the inputs, which are part of it: measured, and a few
    percent above, at K = V = 64."""
    if (rule, decay) == ("mesa", "vector"):
        return
    cut(monkeypatch, 32, 64)
    options = {"steps": 4} if rule == "mesa" else {}
    sizes = []
    for T in (512, 1024):
        args = arguments(rule, decay, B=1, T=T, H=1, K=64, V=64)
        leaf = {name: x.float().requires_grad_() for name, x in tensors(args).items()}
        inputs = sum(x.nbytes for x in leaf.values() if x.shape[1] == T)
        with Allocated() as quiet, torch.no_grad():
            run(rule, {**args, **leaf}, **options)
        with Allocated() as allocated:
            o, *states = run(rule, {**args, **leaf}, **options)
            held = allocated.now()
            torch.autograd.grad(o.sum() + sum(x.sum() for x in states), list(leaf.values()))
        sizes.append([n / inputs for n in (quiet.peak, held, allocated.peak)])
    most = (without, kept, peak)
    assert all(1 < a < b for a, b in zip(sizes[1], most, strict=True)), sizes
    assert all(2 * b < 2.1 * a for a, b in zip(*sizes, strict=True)), sizes


@pytest.mark.parametrize("rule", ["linear", "delta", "mesa"])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("square", [True, False])
def test_a_second_derivative_is_refused(rule: str, whole: bool, square: bool) -> None:
    """Of a penalty |d loss / d q|^2 + |k|^2, for all leaves or for k alone, and for a loss whose
    own gradient is a constant too."""
    args = arguments(rule)
    q, k = args["q"].requires_grad_(), args["k"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"twice|second"):
        o = run(rule, args)[0]
        loss = o.square().sum() if square else o.sum()
        (grad,) = torch.autograd.grad(loss, q, create_graph=True)
        penalty = grad.square().sum() + k.square().sum()
        torch.autograd.backward(penalty, inputs=None if whole else [k])
