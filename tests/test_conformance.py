"""The law, proven for every registered layer, every case it declares and every impl it has.

A new layer is tested without an edit here. Everything is float64 unless it says otherwise.
"""

from __future__ import annotations

import copy
import functools
import io
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from layerzoo.layer import Layer, Reduction, build, get_layer, list_layers
from layerzoo.memory import Memory
from layerzoo.ops import ImplError

from .arithmetic import FAULTS, Arithmetic, to_bfloat16
from .precision import DRAWS, Error, check, errors, ratios

DIM = 24
SHORT, LONG = 20, 150  # the long one is longer than any chunk of the ops


class Case(NamedTuple):
    name: str
    n: int
    impl: str

    def build(self, dtype: torch.dtype = torch.float64, draw: int = 1) -> Layer:
        """The layer, with noise on every parameter: ones and zeros would hide a missing factor."""
        torch.manual_seed(draw)
        layer = build(self.name, dim=DIM, **get_layer(self.name).cases[self.n])
        with torch.no_grad():
            for p in layer.parameters():
                p += 0.05 * torch.randn_like(p)
        layer.impl = self.impl
        return layer.to(self.device, dtype)

    @property
    def device(self) -> str:
        return "cuda" if self.impl == "triton" else "cpu"


def impls(layer: Layer) -> list[str]:
    """The implementations that all of the layer's ops have here; of no op, what there is."""
    ops = layer.ops()
    common = [i for i in ("recurrent", "chunked") if ops and all(i in op.impls for op in ops)]
    if ops and torch.cuda.is_available() and takes_kernels(layer):
        common.append("triton")
    return common or ["auto"]


def takes_kernels(layer: Layer) -> bool:
    """Its kernels run it, and do not say why they cannot."""
    layer = copy.deepcopy(layer).to("cuda")
    layer.impl = "triton"
    try:
        layer(torch.zeros(1, 2, DIM, device="cuda"))
    except ImplError:
        return False
    return True


def cases() -> Iterator[Case]:
    for name in list_layers():
        for n in range(len(get_layer(name).cases)):
            layer = build(name, dim=DIM, **get_layer(name).cases[n])
            yield from (Case(name, n, impl) for impl in impls(layer))


def table(*impl: str, only: Callable[[Case], bool] = lambda case: True) -> Any:
    """Parametrise over the cases, with ids such as gated_delta-1-chunked."""
    rows = [c for c in ALL if (not impl or c.impl in impl) and only(c)]
    return pytest.mark.parametrize("case", rows, ids=["-".join(map(str, c)) for c in rows])


@pytest.fixture(autouse=True)
def _warn_always() -> Iterator[None]:
    """Warnings are errors, also those that torch gives once a process, else only the first test
    that meets one would fail."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


ALL = list(cases())
SPOILED = ("linear", "gated_delta", "sliding")
WIDE = ("recurrent", "chunked", "auto")  # those that run in float64
FAST = ("chunked", "triton")
CAUSAL_T = 40


def tokens(B: int, T: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(T)
    return torch.randn(B, T, DIM, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(got: Any, want: Any, tol: float) -> None:
    """Pytrees of the same structure, shapes and dtypes, equal to `tol` of the largest entry."""
    (xs, got_tree), (ys, want_tree) = tree_flatten(got), tree_flatten(want)
    assert got_tree == want_tree
    for x, y in zip(xs, ys, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert torch.isfinite(x).all()
        if y.numel():
            # The floor is for exact zeros, such as the gradient of a softmax over one key.
            atol = tol * max(float(y.detach().abs().max()), 1e-3)
            torch.testing.assert_close(x, y, rtol=0, atol=atol)


def in_pieces(layer: Layer, x: Tensor, sizes: list[int], state: Any = None) -> Any:
    outputs = []
    for piece in x.split(sizes, 1):
        y, state = layer(piece, state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def weighted(tree: Any) -> Tensor:
    """A loss to which every floating-point entry contributes with its own weight."""
    leaves = [x for x in tree_leaves(tree) if x.is_floating_point()]
    return sum((x * torch.linspace(-1, 2, x.numel()).to(x).view_as(x)).sum() for x in leaves)


@pytest.mark.parametrize("name", list_layers())
def test_registered(name: str) -> None:
    cls = get_layer(name)
    assert cls.name == name and cls.cases and cls.source
    assert cls.kind in ("memory", "attention", "composition")
    for case in cls.cases:
        layer = build(name, dim=DIM, **case)
        again = build(json.loads(json.dumps(layer.spec())), dim=DIM)
        assert again.config == build(layer.spec(), dim=DIM).config
        assert again.spec() == layer.spec() and type(again) is cls
        assert again.state_dict().keys() == layer.state_dict().keys()


@table(*WIDE)
def test_shapes_and_lengths(case: Case) -> None:
    layer = case.build()
    for T in (0, 1, SHORT):
        x = tokens(2, T)
        y, state = layer(x)
        assert y.shape == x.shape and y.dtype == x.dtype
        assert_close((y, state), layer(x, layer.init_state(2)), 0.0)  # None is init_state
        if T == 0:
            assert_close(state, layer.init_state(2), 0.0)
    empty, same = layer(x[:, :0], state)  # of the last, T = SHORT
    assert empty.shape == (2, 0, DIM)
    assert_close(same, state, 0.0)
    initial, reached = tree_leaves(layer.init_state(2)), tree_leaves(state)
    assert any(a.shape != b.shape or not a.equal(b) for a, b in zip(initial, reached, strict=True))


@table()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_dtype(case: Case, dtype: torch.dtype) -> None:
    """Accumulators are float32 or wider, also under autocast; caches keep the keys' dtype."""
    autocast = dtype == torch.bfloat16
    wide = torch.float32 if autocast else dtype
    if case.impl == "triton" and wide == torch.float64:
        return  # a kernel may refuse float64
    layer, x = case.build(wide), tokens(2, SHORT, wide).to(case.device)
    with torch.autocast(case.device, torch.bfloat16, enabled=autocast):
        y, state = in_pieces(layer, x, [SHORT - 3, 3])
    assert y.dtype == dtype
    found = {leaf.dtype for leaf in tree_leaves(state) if leaf.is_floating_point()}
    assert found <= {"memory": {wide}}.get(layer.kind, {wide, dtype})


@table(*WIDE)
def test_split_anywhere(case: Case) -> None:
    layer, x = case.build(), tokens(2, SHORT)
    whole = layer(x)
    splits = [[at, SHORT - at] for at in range(SHORT + 1)]
    for sizes in ([1] * SHORT, [7, 0, SHORT - 7], [0, 0, SHORT], *splits):
        assert_close(in_pieces(layer, x, sizes), whole, 1e-9)


@table(*WIDE)
def test_split_long(case: Case) -> None:
    layer, x = case.build(), tokens(2, LONG)
    whole = layer(x)
    for sizes in ([1, LONG - 1], [LONG - 1, 1], [64, 86], [33, 0, 50, 67]):
        assert_close(in_pieces(layer, x, sizes), whole, 1e-9)


@table(*WIDE)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_rollback(case: Case, mode: Any) -> None:
    """`forward` never changes the state it is given, whatever is continued from it. Without
    gradients too, where an update in place is tempting."""
    layer, x = case.build(), tokens(2, SHORT)
    want = layer(x)
    with mode():
        _, state = layer(x[:, :9])
        before = tree_map(torch.clone, state)
        first = layer(x[:, 9:], state)
        for t in range(3):  # another branch: an append in place must not reach the first one
            layer(-x[:, t : t + 1], state)
            assert_close(state, before, 0.0)
        assert_close(layer(x[:, 9:], state), first, 0.0)
        recorded = any(leaf.requires_grad for leaf in tree_leaves((state, first)))
        assert recorded == torch.is_grad_enabled(), "a state would keep all that came before"
        assert_close(first, layer(x[:, 9:], before), 0.0)
        assert_close((first[0], first[1]), (want[0][:, 9:], want[1]), 1e-9)


@table(*WIDE)
def test_causal_at_every_position(case: Case) -> None:
    layer, T = case.build(), CAUSAL_T
    x = tokens(1, T).repeat(T + 1, 1, 1)  # row t perturbs token t; the last row is left alone
    x[range(T), range(T)] += tokens(1, T + 1)[0, :T]
    y, _ = layer(x)
    for t in range(T):
        change = (y[t] - y[T]).abs().amax(-1)
        assert (change[:t] <= 1e-12).all(), f"token {t} changes an output before it"
        assert change[t:].max() > 1e-6, f"token {t} changes nothing"


@table(*WIDE)
def test_rows_are_independent(case: Case) -> None:
    layer, x = case.build(), tokens(3, SHORT)
    y, state = in_pieces(layer, x, [11, 9])
    for row in range(3):
        alone = in_pieces(layer, x[row : row + 1], [11, 9])
        mine = tree_map(lambda s, row=row: s[row : row + 1] if s.dim() else s, state)
        assert_close(alone, (y[row : row + 1], mine), 1e-11)


@table(*WIDE)
def test_every_parameter_learns(case: Case) -> None:
    layer, x = case.build(), tokens(2, SHORT)
    weighted(in_pieces(layer, x, [11, 9])[0]).backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(p.grad).all(), f"{name} has a gradient that is not finite"


def outcome(
    layer: Layer, dtype: torch.dtype = torch.float64, autocast: bool = False, past: int = 37
) -> Any:
    """Output, final state and every gradient (parameters, x, incoming state) of a long sequence
    in two pieces, continued after `past` tokens from a state that itself takes a gradient."""
    device = next(layer.parameters()).device
    x = tokens(2, LONG, dtype).to(device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            _, state = layer(tokens(2, past, dtype).to(device))
        state = tree_map(lambda s: s.requires_grad_() if s.is_floating_point() else s, state)
        y, final = in_pieces(layer, x, [60, 90], state)
    leaves = [*layer.parameters(), x, *(s for s in tree_leaves(state) if s.is_floating_point())]
    grads = torch.autograd.grad(weighted((y, final)), leaves, materialize_grads=True)
    return tree_map(torch.detach, (y, final, grads))


@table("chunked")
@pytest.mark.parametrize("past", [0, 37])  # sinks and warm-ups are only at work at the start
def test_recurrent_equals_chunked(case: Case, past: int) -> None:
    recurrent = outcome(case._replace(impl="recurrent").build(), past=past)
    assert_close(outcome(case.build(), past=past), recurrent, 1e-9)


@functools.lru_cache(DRAWS)
def exact(case: Case, draw: int) -> list[Tensor]:
    return tree_leaves(outcome(case._replace(impl="recurrent").build(draw=draw)))


def wrong(case: Case, kind: str, draw: int) -> dict[str, Error]:
    """By output, state and gradient, what a case is wrong by in that precision."""
    layer, want = case.build(torch.float32, draw), exact(case._replace(impl=""), draw)
    got = tree_leaves(outcome(layer, torch.float32, autocast=kind == "bfloat16"))
    at = [n for n, x in enumerate(want) if x.is_floating_point()]
    return errors({f"leaf {n}": got[n] for n in at}, {f"leaf {n}": want[n] for n in at})


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@table(*FAST)
def test_low_precision(kind: str, case: Case) -> None:
    """By the rule of tests/precision.py, against what the specification makes in that
    precision."""
    specification, draws = case._replace(impl="recurrent"), range(DRAWS)
    check(*([wrong(run, kind, draw) for draw in draws] for run in (case, specification)))


@table("chunked", only=lambda case: case.n == 0 and case.name in SPOILED)
def test_low_precision_sees_faults_of_an_op(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted in `chunked` alone, and not in projections."""
    (op,) = case.build().ops()
    chunked = op.impls["chunked"]
    reference = [wrong(case._replace(impl="recurrent"), "float32", n) for n in range(DRAWS)]

    def share(plant: Callable[..., Any]) -> float:
        monkeypatch.setitem(op.impls, "chunked", plant)
        return max(ratios([wrong(case, "float32", 0)], reference).values())

    def computed(arithmetic: Arithmetic) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with sdpa_kernel(SDPBackend.MATH), arithmetic:
                return chunked(*args, **kwargs)

        return run

    def forgotten(*args: Any, state: Any = None, **kwargs: Any) -> Any:
        low = tree_map(lambda x: to_bfloat16(x) if x.is_floating_point() else x, state)
        return chunked(*args, state=low, **kwargs)

    shares = {name: share(computed(fault)) for name, fault in FAULTS.items()}
    if case.name != "sliding":  # whose cache is as the keys are
        shares["upcast of the state"] = share(forgotten)
    assert share(chunked) < 0.75
    assert min(shares.values()) > 30, shares


@table(*WIDE)
def test_gates_reduce(case: Case) -> None:
    """A gate at its neutral value is the rule without the gate."""
    if case.n:
        return  # the reductions are the layer's, not a case's
    cls = get_layer(case.name)
    for reduction in cls.reductions:
        gated, parent = (
            build({"name": case.name, **spec}, dim=DIM).double()
            for spec in (reduction.spec, reduction.parent)
        )
        gated.impl = parent.impl = case.impl
        with torch.no_grad():
            for p in parent.parameters():
                p += 0.05 * torch.randn_like(p)
        gated.load_state_dict(parent.state_dict(), strict=False)
        x = tokens(2, LONG)
        want, _ = in_pieces(parent, x, [60, 90])
        if reduction.neutral is not Reduction._field_defaults["neutral"]:
            assert (gated(x)[0] - want).abs().max() > 1e-6, "the gate does nothing"
        reduction.neutral(gated)
        assert_close(in_pieces(gated, x, [60, 90])[0], want, 1e-12)


@table(*WIDE)
@pytest.mark.parametrize("T", [1, 3, CAUSAL_T])
def test_state_bytes(case: Case, T: int) -> None:
    layer = case.build(torch.float32)
    _, state = layer(tokens(1, T, torch.float32))
    leaves = tree_leaves(state)
    size = layer.state_bytes(T)
    assert sum(leaf.nbytes for leaf in leaves) == size.total == size.memory + size.buffers
    if T == CAUSAL_T:  # a view would keep, and save, all of the tensor that it was cut from
        held = sum(leaf.untyped_storage().nbytes() for leaf in leaves)
        assert held <= 2 * size.total  # slack, in which a cache may append


@table("recurrent", "auto")
@pytest.mark.parametrize("T", [1, 3, CAUSAL_T])
def test_flops(case: Case, T: int) -> None:
    layer = case.build()
    solves = {
        torch.ops.aten._linalg_solve_ex: lambda A, *_, **__: A[:-2].numel() * 2 * A[-1] ** 3 / 3
    }
    with FlopCounterMode(display=False, custom_mapping=solves) as counter, torch.no_grad():
        layer(tokens(1, T))
    measured = counter.get_total_flops() / T
    assert layer.flops_per_token(T) == pytest.approx(measured, rel=1e-6)


@table("chunked", "auto", only=lambda case: case.n == 0)  # each costs seconds
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_compile(case: Case) -> None:
    layer, x = case.build(), tokens(2, SHORT)
    torch.compiler.reset()
    compiled: Any = torch.compile(layer, backend="aot_eager", dynamic=False)
    sizes = [SHORT // 2, SHORT // 2]  # of equal length, to compile less
    with torch.no_grad():
        state = layer.init_state(2)
        assert_close(in_pieces(compiled, x, sizes, state), in_pieces(layer, x, sizes), 1e-12)


@table(*WIDE)
def test_saved_state_continues(case: Case) -> None:
    layer, x = case.build(), tokens(2, SHORT)
    _, state = layer(x[:, :11])
    file = io.BytesIO()
    torch.save(tree_map(torch.detach, state), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    assert_close(again(x[:, 11:], loaded), layer(x[:, 11:], state), 0.0)


def is_memory(case: Case) -> bool:
    return issubclass(get_layer(case.name), Memory)


@table(*WIDE, only=is_memory)
@pytest.mark.parametrize("reads, writes", [(9, 5), (9, 0), (5, 9), (0, 9), (0, 0), (1, 4)])
def test_mix_aligns_at_the_right(case: Case, reads: int, writes: int) -> None:
    """Early queries read the incoming state; writes without a query are written all the same."""
    layer = case.build()
    assert isinstance(layer, Memory)
    _, state = layer(tokens(2, SHORT))
    q, write = layer.project(tokens(2, 9))
    q, write = q[:, 9 - reads :], {name: w[:, 9 - writes :] for name, w in write.items()}
    got = layer.mix(q, write, state)

    def at(x: Tensor, n: int) -> Tensor:
        """Token n of the longer of the two, empty where the shorter one has not begun."""
        n -= length - x.shape[1]
        return x[:, n : n + 1] if n >= 0 else x[:, :0]

    length, before, outputs = max(reads, writes), state, [got[0][:, :0]]
    for n in range(length):
        o, state = layer.mix(at(q, n), {name: at(w, n) for name, w in write.items()}, state)
        outputs.append(o)
    assert_close(got, (torch.cat(outputs, 1), state), 1e-9)
    assert_close(layer.mix(q[:, :0], write, before)[1], got[1], 1e-9)
    if not writes:
        assert_close(got[1], before, 0.0)
