"""The kernels of fast weights with update `token` against the specification."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from layerzoo.kernels import launch
from layerzoo.memories.fast_weights import Rule, fast_weights
from layerzoo.memories.fast_weights.op import OP
from layerzoo.memories.fast_weights.state import init_state
from layerzoo.ops import ImplError

pytestmark = pytest.mark.usefixtures("inside")
GPU = torch.cuda.is_available()
ALL: Any = {"bias": True, "residual": True, "layer_norm": True}
WIDE = ("weights", "lr", "momentum", "decay", "row", "layer_norm", "state")
TOKENS = ("q", "k", "v", "lr", "momentum", "decay")
RULES: dict[str, Any] = {
    "ttt_linear": {"network": {"name": "linear", **ALL}},
    "ttt_mlp": {"network": {"name": "mlp", "activation": "gelu_tanh", **ALL}},
    "titans": {"network": "mlp", "optimiser": "momentum", "forgetting": "decay"},
    "linear": {"network": "linear", "objective": "dot", "optimiser": "momentum"},
    "biased": {
        "network": {"name": "linear", "bias": True, "layer_norm": True},
        "optimiser": "momentum",
        "forgetting": "decay",
    },
    "all": {
        "network": {"name": "mlp", **ALL},
        "optimiser": "momentum",
        "forgetting": "decay",
    },
    "dot": {
        "network": {"name": "mlp", "bias": True, "layer_norm": True},
        "objective": "dot",
        "forgetting": "decay",
    },
}


class Problem:
    """A rule with float64 tensors by name, and what calls the op with them."""

    def __init__(
        self,
        name: str,
        T: int,
        K: int = 64 if GPU else 16,
        V: int | None = None,
        C: int = 16,
        B: int = 1,
        H: int = 2,
        rates: bool = False,
        row: bool = False,
        state: int | None = None,
    ) -> None:
        """state: tokens that a given one has read."""
        self.rule = rule = at_small(RULES[name], C)
        self.T, V = T, V or K
        g = torch.Generator().manual_seed(len(name) + T)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=g, dtype=torch.float64)

        network = rule.network
        shapes = [(i + network.bias, o) for i, o in network.shapes(K, V)]
        at = (B, T, H)
        x = {n: normal(*at, size) for n, size in (("q", K), ("k", K), ("v", V))}
        x["k"] /= x["k"].norm(dim=-1, keepdim=True)
        x["lr"] = 0.05 * uniform(*at, *((len(shapes),) if rates else ()))
        self.tensors: dict[str, Any] = x
        x = self.tensors
        x["weights"] = tuple(normal(H, i, o) / i**0.5 for i, o in shapes)
        if rule.has_momentum:
            x["momentum"] = uniform(*at)
        if rule.has_decay:
            x["decay"] = 0.3 * uniform(*at)
            x["decay"][:, T // 2 : T // 2 + 1] = 1.0  # a reset
        if row:
            x["row"] = 1 / (1 + uniform(C))
        if network.layer_norm:
            x["layer_norm"] = (1 + 0.1 * normal(H, V), 0.1 * normal(H, V))
        if state is not None:
            begun = init_state(rule, x["weights"], B)
            x["state"] = tree_map(
                lambda t: t + 0.1 * normal(*t.shape) if t.is_floating_point() else t + state, begun
            )
            if "retention" in begun:
                x["state"]["retention"] = uniform(B, H)

    def __call__(self, impl: str, cuts: tuple[int, ...] = (), **given: Any) -> Any:
        state, outputs = given.pop("state", None), []
        for a, b in itertools.pairwise((0, *cuts, self.T)):
            piece = {n: x[:, a:b] if n in TOKENS else x for n, x in given.items()}
            o, state = fast_weights(**piece, spec=self.rule, state=state, impl=impl)
            outputs.append(o)
        return torch.cat(outputs, 1), {n: x for n, x in state.items() if n != "position"}

    def given(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
        """Its tensors, q, k and v of dtype."""

        def cast(name: str, x: Any) -> Any:
            to = dtype if name in "qkv" else torch.float32
            return tree_map(lambda t: t.to(device, to) if t.is_floating_point() else t, x)

        return {name: cast(name, x) for name, x in self.tensors.items()}


def at_small(fields: Any, C: int) -> Rule:
    """The rule, with a narrow network in the interpreter."""
    fields = dict(fields)
    network = fields["network"]
    network = dict(network) if isinstance(network, dict) else {"name": network}
    if network["name"] == "mlp":
        network["expansion"] = 4.0 if GPU else 2.0
    return Rule(**{**fields, "network": network, "mini_batch": C})


CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("ttt_linear", 37, {"row": True, "B": 2}),
    ("ttt_linear", 7, {"C": 5, "K": 9, "row": True, "state": 3}),
    ("ttt_mlp", 37, {"row": True, "H": 1}),
    ("ttt_mlp", 16, {"rates": True, "row": True, "B": 2, "H": 1}),
    ("ttt_mlp", 21, {"C": 20, "K": 11, "state": 7, "row": True}),
    ("titans", 19, {"V": 23}),
    ("titans", 3, {"C": 1, "state": 2}),
    ("titans", 1, {"state": 21, "rates": True, "B": 2}),
    ("linear", 19, {"V": 7, "state": 16}),
    ("biased", 13, {"C": 8, "V": 23, "row": True, "state": 5, "B": 2}),
    ("all", 24, {"row": True, "state": 10, "rates": True, "B": 2}),
    ("all", 5, {"state": 32}),
    ("dot", 19, {"V": 9, "state": 14, "B": 2}),
]
if GPU:  # few: compiling takes the time
    CASES += [
        ("ttt_linear", 200, {"C": 64, "B": 2, "row": True}),
        ("ttt_mlp", 200, {"C": 64, "B": 2, "row": True}),
        ("titans", 256, {"C": 64, "B": 2}),
        ("all", 96, {"C": 32, "K": 128, "row": True}),
        ("linear", 96, {"C": 32, "K": 128}),
    ]
IDS = [f"{name}-{T}-" + "-".join(f"{n}{x}" for n, x in kw.items()) for name, T, kw in CASES]


@pytest.mark.parametrize(("name", "T", "fields"), CASES, ids=IDS)
def test_equals_the_specification(
    judge: Callable[..., None], name: str, T: int, fields: dict[str, Any]
) -> None:
    problem = Problem(name, T, **fields)
    judge(OP, problem, problem.tensors, wide=WIDE)


@pytest.mark.parametrize("name", ["ttt_linear", "ttt_mlp", "all"])
def test_pieces_equal_the_whole(name: str, device: torch.device, poison: None) -> None:
    """Also a token at a time, without a gradient, which is how a layer generates."""
    problem = Problem(name, 39 if GPU else 22, row=True)
    given = problem.given(device)
    want = problem("triton", **given)
    for cuts in ((5, 16, 20, 21), tuple(range(1, 19))):
        with torch.no_grad():
            made = problem("triton", cuts, **given)
        for x, y in zip(tree_leaves(made), tree_leaves(want), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_a_given_state_stays(device: torch.device) -> None:
    problem = Problem("all", 9, state=12)
    given = problem.given(device)
    before = tree_map(torch.clone, given["state"])
    problem("triton", **given)
    for x, y in zip(tree_leaves(before), tree_leaves(given["state"]), strict=True):
        assert torch.equal(x, y)
    empty = {n: x[:, :0] if n in TOKENS else x for n, x in given.items()}
    o, state = fast_weights(**empty, spec=problem.rule, impl="triton")
    assert o.shape[1] == 0
    assert state["position"] == 12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"network": "glu"}, "its networks are"),
        ({"network": {"name": "mlp", "depth": 3}}, "its networks are"),
        ({"objective": "huber"}, "its objective is 'l2' or 'dot', not 'huber'"),
        ({"forgetting": "norm"}, "its forgetting is 'none' or 'decay', not 'norm'"),
        ({"mini_batch": 129}, "mini_batch is at most 128, got 129"),
    ],
)
def test_refuses_what_it_cannot(fields: Any, message: str, device: torch.device) -> None:
    problem = Problem("titans", 3)
    problem.rule = rule = Rule(**fields)
    g = torch.Generator().manual_seed(0)
    weights = tuple(torch.randn(2, *s, generator=g).to(device) for s in rule.network.shapes(4, 4))
    given: Any = {n: torch.zeros(1, 3, 2, 4, device=device) for n in "qkv"}
    lr = torch.zeros(1, 3, 2, device=device)
    with pytest.raises(ImplError, match=message):
        problem("triton", **given, weights=weights, lr=lr)


def test_wide_heads_are_refused(device: torch.device) -> None:
    problem = Problem("ttt_linear", 3, K=130)
    with pytest.raises(ImplError, match="at most 128 channels"):
        problem("triton", **problem.given(device))


@pytest.mark.parametrize("name", ["ttt_mlp", "biased"])
def test_has_no_second_derivative(name: str, device: torch.device) -> None:
    problem = Problem(name, 5)
    given = problem.given(device)
    given["q"].requires_grad_()
    o, _ = problem("triton", **given)
    (grad,) = torch.autograd.grad(o.square().sum(), given["q"], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch.compile itself
def test_compiles_around_it_and_under_autocast(device: torch.device) -> None:
    problem = Problem("all", 20, H=2 if GPU else 1)
    given = problem.given(device)
    given["q"].requires_grad_()

    def loss(q: Tensor) -> Tensor:
        o, _ = problem("triton", **{**given, "q": q})
        return (o * 3).sum()

    want = torch.autograd.grad(loss(given["q"]), given["q"])
    compiled = torch.compile(loss, backend="aot_eager")
    made = torch.autograd.grad(compiled(given["q"]), given["q"])
    torch.testing.assert_close(made, want)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = torch.autograd.grad(loss(given["q"]), given["q"])
    torch.testing.assert_close(cast, want)


def test_operators_describe_themselves(device: torch.device) -> None:
    """Shapes without a run, a gradient, no aliases: what torch asks of an operator."""
    from layerzoo.kernels.fast_weights import operators, token

    problem = Problem("all", 32, rates=True)
    g = problem.given(device)
    rule, lr, n = problem.rule, g["lr"], 16
    form = token.make_form(g["q"], g["v"], lr, rule, g["weights"])
    coefficients, _ = token.make_coefficients(
        rule, (lr, g["momentum"], g["decay"]), None, None, n, True, form
    )
    w = token.pack(init_state(rule, g["weights"], 1)["weights"], form)
    norm = tuple(x.clone() for x in g["layer_norm"])
    given = (g["q"], g["k"], g["v"], *coefficients, *norm, w, None, w * 0)
    leaves = tuple(None if x is None else x.detach().requires_grad_() for x in given)
    torch.library.opcheck(
        operators.token_forward,
        (*leaves, [int(x) for x in form], True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_tiles_divide_the_hidden_dimension() -> None:
    """A tile divides the hidden dimension."""
    from layerzoo.kernels.fast_weights.operators import TileForm, settings

    for target in launch.TARGETS.values():
        for C, K, F in ((16, 64, 256), (64, 64, 256), (128, 128, 512), (16, 16, 32)):
            form = TileForm(C, C, K, K, F, K, 1, *[True] * 6)
            for dtype in (torch.float32, torch.bfloat16):
                assert F % settings(form, dtype, target).tile == 0
