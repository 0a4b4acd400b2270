"""What ops, layers and models refuse: arguments that do not fit, alike for every impl."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from layerzoo import SpecError, attention, build, get_layer, list_layers, memories
from layerzoo.memories.fast_weights import Rule
from layerzoo.memories.fast_weights.state import init_state
from layerzoo.model import LanguageModel
from layerzoo.ops import ImplError

B, T, H, G, K, V, R = 2, 5, 4, 2, 3, 6, 7
RULE = Rule(network="linear", optimiser="momentum", forgetting="decay", mini_batch=4)
POSITION = torch.tensor(9)
KV = {"k": torch.randn(B, 9, G, K), "v": torch.randn(B, 9, G, V), "position": POSITION}


def unit(*shape: int) -> Tensor:
    return torch.rand(shape)


QKV = {"q": unit(B, T, H, K), "k": unit(B, T, H, K), "v": unit(B, T, H, V)}
GROUPED = {"q": unit(B, T, H, K), "k": unit(B, T, G, K), "v": unit(B, T, G, V), "state": KV}
LATENT = {"k": unit(B, 9, 2), "v": unit(B, 9, R), "position": POSITION}
WEIGHTS = (unit(H, K, V),)
OPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (
        memories.linear_attention,
        {**QKV, "log_decay": -unit(B, T, H), "state": unit(B, H, K, V)},
    ),
    "delta": (
        memories.delta_rule,
        {
            **QKV,
            "beta": unit(B, T, H),
            "log_decay": -unit(B, T, H, K),
            "state": unit(B, H, K, V),
        },
    ),
    "mesa": (
        memories.mesa,
        {
            **QKV,
            "beta": unit(B, T, H),
            "log_decay": -unit(H),
            "ridge": 1 + unit(H, K),
            "state": (torch.zeros(B, H, K, K), unit(B, H, K, V)),
        },
    ),
    "fast_weights": (
        memories.fast_weights,
        {
            **QKV,
            "weights": WEIGHTS,
            "spec": RULE,
            "lr": unit(B, T, H),
            "momentum": unit(B, T, H),
            "decay": unit(B, T, H),
            "row": unit(4),
            "state": init_state(RULE, WEIGHTS, B),
        },
    ),
    "softmax": (attention.softmax_attention, GROUPED),
    "sliding": (attention.sliding_attention, {**GROUPED, "window": 10}),
    "softmax, sink logit": (
        attention.softmax_attention,
        {**GROUPED, "sink_logit": unit(H)},
    ),
    "sliding, sink logit": (
        attention.sliding_attention,
        {**GROUPED, "window": 10, "sink_logit": unit(H)},
    ),
    "forgetting": (
        attention.forgetting_attention,
        {
            **GROUPED,
            "log_forget": -unit(B, T, H),
            "state": {**KV, "log_forget": -unit(B, 9, H), "position": POSITION},
        },
    ),
    "differential": (
        attention.differential_attention,
        {
            **GROUPED,
            "q": unit(B, T, 2 * H, K),
            "k": unit(B, T, 2 * G, K),
            "mix": torch.tensor(0.5),
            "state": {**KV, "k": unit(B, 9, 2 * G, K)},
        },
    ),
    "latent": (
        attention.latent_attention,
        {
            "q": unit(B, T, H, K + 2),
            "latent": unit(B, T, R),
            "position_key": unit(B, T, 2),
            "up": unit(H, K + V, R),
            "state": LATENT,
        },
    ),
}
IMPLS = pytest.mark.parametrize("impl", ["recurrent", "chunked"])
EVERY_OP = pytest.mark.parametrize("name", OPS)


def call(name: str, impl: str = "chunked", **change: Any) -> Any:
    op, given = OPS[name]
    return op(**{**given, **change}, impl=impl)


def wrong(x: Tensor) -> list[Tensor]:
    """Tensors like x with an axis more, one less, and one entry more along each axis."""
    more = [torch.cat((x, x.narrow(n, 0, 1)), n) for n in range(x.dim())]
    return [x.unsqueeze(-1), *more, *([x[0]] if x.dim() > 1 else [])]


@IMPLS
@EVERY_OP
def test_an_op_refuses_tensors_of_other_shapes(name: str, impl: str) -> None:
    _, given = OPS[name]
    call(name, impl)
    for argument, x in given.items():
        if not isinstance(x, Tensor) or x.dim() == 0:
            continue
        bads = wrong(x)[argument == "lr" :]  # which may have an axis for the matrices
        if name == "latent" and argument in ("q", "up"):
            del bads[4 if argument == "q" else 2]  # widths that the other one is cut by
        for bad in bads:
            with pytest.raises(SpecError) as error:
                call(name, impl, **{argument: bad})
            assert "\n" not in str(error.value), error.value
            if argument not in ("q", "k", "v", "latent", "position_key"):  # they say what fits
                assert f"{argument}: shape {tuple(bad.shape)} is " in str(error.value)


@IMPLS
@EVERY_OP
def test_an_op_refuses_a_state_of_other_rows_or_another_structure(name: str, impl: str) -> None:
    _, given = OPS[name]
    state = given["state"]

    def rows(x: Any) -> Any:
        if isinstance(x, dict):
            return {part: rows(y) for part, y in x.items()}
        if isinstance(x, tuple):
            return tuple(map(rows, x))
        return x[:1] if x.dim() else x

    others = [("shape", rows(state)), ("instead of a", [1]), ("instead of a", "a state")]
    if isinstance(state, dict):
        others.append(("has ", {"position": POSITION}))
    op = OPS[name][0].__name__.rpartition(".")[2]
    for fault, other in others:
        with pytest.raises(SpecError, match=f"^{op}: state.*{fault}"):
            call(name, impl, state=other)


@IMPLS
@EVERY_OP
def test_an_op_refuses_integers_and_what_is_no_tensor(name: str, impl: str) -> None:
    for bad, fault in ((torch.ones(B, T, H, K).long(), "int64"), (None, "None"), ("q", "a str")):
        if isinstance(bad, Tensor):
            bad = torch.ones(OPS[name][1]["q"].shape, dtype=torch.int64)
        with pytest.raises(SpecError, match=f"q: is .*{fault}"):
            call(name, impl, q=bad)


@IMPLS
@pytest.mark.parametrize("name", ["linear", "delta", "mesa"])
def test_a_decay_in_place_of_its_logarithm(name: str, impl: str) -> None:
    with pytest.raises(SpecError, match=r"log_decay: 0\.9 is above 0; give its logarithm"):
        call(name, impl, log_decay=torch.full((B, T, H), 0.9))
    call(name, impl, log_decay=torch.full((B, T, H), -torch.inf))
    call(name, impl, log_decay=torch.zeros(B, T, H, requires_grad=True))


@IMPLS
def test_other_values_out_of_bounds(impl: str) -> None:
    with pytest.raises(SpecError, match=r"log_forget: 0\.5 is above 0; give its logarithm"):
        call("forgetting", impl, log_forget=torch.full((B, T, H), 0.5))
    with pytest.raises(SpecError, match=r"decay: -0\.1 is below 0; give a fraction"):
        call("fast_weights", impl, decay=torch.full((B, T, H), -0.1))
    with pytest.raises(SpecError, match=r"momentum: 1\.5 is above 1; give a fraction"):
        call("fast_weights", impl, momentum=torch.full((B, T, H), 1.5))
    with pytest.raises(SpecError, match=r"ridge: -1 is below 0; it must be positive"):
        call("mesa", impl, ridge=-torch.ones(H, K))


@IMPLS
@EVERY_OP
def test_an_op_takes_no_tokens_and_no_rows(name: str, impl: str) -> None:
    _, given = OPS[name]
    tokens = {
        n: x[:, :0]
        for n, x in given.items()
        if isinstance(x, Tensor) and x.dim() > 1 and x.shape[:2] == (B, T)
    }
    o, _ = call(name, impl, **tokens)
    assert o.shape == (B, 0, H, V)


def test_an_op_on_the_meta_device_reads_no_values() -> None:
    given = {n: x.to("meta") for n, x in OPS["linear"][1].items()}
    o, _ = memories.linear_attention(**given, impl="chunked")
    assert o.shape == (B, T, H, V)
    with pytest.raises(SpecError, match="v: is on cpu, what is before it meta"):
        memories.linear_attention(**{**given, "v": QKV["v"]})


def test_the_ops_are_imported_from_their_packages() -> None:
    """Two are modules that are called. (That they are light, test_registry.py has.)"""
    for op in (memories.mesa, memories.fast_weights):
        name = op.__name__.rpartition(".")[2]
        inner = vars(op)[name]
        assert sys.modules[f"layerzoo.memories.{name}"] is op and inner is not op
        assert list(inspect.signature(op).parameters) == list(inspect.signature(inner).parameters)


CASES = [(name, n) for name in list_layers() for n in range(len(get_layer(name).cases))]
EVERY_CASE = pytest.mark.parametrize("name, n", CASES, ids=lambda x: str(x))
D = 24


def layer_of(name: str, n: int = 0, impl: str = "auto") -> Any:
    layer = build(name, dim=D, **get_layer(name).cases[n])
    layer.impl = impl
    return layer


@EVERY_CASE
def test_a_layer_refuses_an_x_or_a_state_that_does_not_fit(name: str, n: int) -> None:
    layer = layer_of(name, n)
    x = torch.randn(B, 7, D)
    state = layer.init_state(B)
    for given in (state, layer(x, state)[1]):
        layer(x[:, :2], given)
        with pytest.raises(SpecError, match=f"^{name}: state.* with B = 3"):
            layer(torch.randn(3, 2, D), given)
    for other in ("nothing", [state], {"a": state}):
        with pytest.raises(SpecError, match=f"^{name}: state"):
            layer(x, other)
    for bad in (x[..., 1:], x[0], x[None], x.long()):
        with pytest.raises(SpecError, match=f"^{name}: x: "):
            layer(bad)


def test_a_layer_refuses_another_layers_state() -> None:
    states = {case: layer_of(*case)(torch.randn(B, 3, D))[1] for case in CASES if case[1] == 0}
    for name in ("softmax", "linear", "titans", "gated", "reset"):
        layer = layer_of(name)
        for (other, _), state in states.items():
            if other in ("softmax", "sliding", "linear", "delta", "gla", name):
                continue  # may be of the same shapes
            if not same_form(layer, state):
                with pytest.raises(SpecError, match=f"^{name}: state"):
                    layer(torch.randn(B, 2, D), state)


def same_form(layer: Any, state: Any) -> bool:
    def shapes(x: Any) -> Any:
        if isinstance(x, dict):
            return {n: shapes(y) for n, y in x.items()}
        if isinstance(x, (list, tuple)):
            return [type(x), *map(shapes, x)]
        return x.shape[2:] if x.dim() > 1 else x.dim()

    return shapes(layer.init_state(B)) == shapes(state)


def test_a_state_follows_what_a_layer_is_set_to() -> None:
    """The form of a state is kept, and made anew when it does not fit."""
    layer: Any = build("titans", dim=D, mini_batch=4)
    x = torch.randn(B, 6, D)
    layer(x, layer.init_state(B))
    layer.mini_batch = 1
    state = layer.init_state(B)
    assert "updates" not in state
    layer(x, state)


def test_a_model_refuses_tokens_and_states_that_do_not_fit() -> None:
    model = LanguageModel(vocab_size=9, layers=["gated_delta", "softmax"], dim=D, persistent=2)
    tokens = torch.randint(9, (B, 4))
    state = model(tokens)[1]
    model(tokens.int(), state)
    with pytest.raises(SpecError, match=r"model: state\.0\.conv: shape .* with B = 3"):
        model(torch.zeros(3, 1, dtype=torch.int64), state)
    with pytest.raises(SpecError, match="model: state: has 1 parts instead of 2"):
        model(tokens, state[:1])
    with pytest.raises(SpecError, match="model: state: is a dict instead of a list"):
        model(tokens, state[0])
    with pytest.raises(SpecError, match="model: tokens: 9 is above 8; give ids of the vocabulary"):
        model(tokens + 9 - tokens)
    with pytest.raises(SpecError, match="model: tokens: -1 is below 0"):
        model(tokens - tokens - 1)
    with pytest.raises(SpecError, match=r"tokens: expected integers \[B, T\], got torch.int16"):
        model(tokens.short())
    assert model(tokens[:, :0])[0].shape == (B, 0, 9)


def functions(layer: nn.Module) -> dict[str, Any]:
    """Transforms of torch.func, of a layer and its input x `[B, T, D]`."""
    params = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(params: Any, x: Tensor) -> Tensor:
        # Tied weights, torch puts back in the order in which it took them: of a module with two
        # names, as the memory of `prefix`, it keeps the stand-ins.
        y, _ = functional_call(layer, params, (x,), tie_weights=False)
        return y.square().sum()

    return {
        "grad": lambda x: grad(loss)(params, x),
        "grad of grad": lambda x: grad(lambda y: grad(loss, 1)(params, y).square().sum())(x),
        "vmap": lambda x: vmap(lambda row: layer(row[None])[0])(x),
        "vmap of grad": lambda x: vmap(grad(loss), (None, 0))(params, x[:, None]),
        "jvp": lambda x: jvp(lambda y: layer(y)[0], (x,), (torch.ones_like(x),))[1],
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch's jvp
@pytest.mark.parametrize("name", list_layers())
def test_torch_func_runs_recurrent_and_says_so(name: str) -> None:
    x = torch.randn(B, 7, D, dtype=torch.float64)
    layer = layer_of(name, impl="recurrent").double()
    got = {what: f(x) for what, f in functions(layer).items()}
    loss = layer(x)[0].square().sum()
    wanted = torch.autograd.grad(loss, list(layer.parameters()), allow_unused=True)
    for (p, g), want in zip(got["grad"].items(), wanted, strict=True):
        want = torch.zeros_like(g) if want is None else want
        torch.testing.assert_close(g, want, rtol=1e-9, atol=1e-9, msg=lambda m, p=p: f"{p}: {m}")
        torch.testing.assert_close(got["vmap of grad"][p].sum(0), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got["vmap"][:, 0], layer(x)[0], rtol=0, atol=1e-9)
    h = 1e-6
    slope = (layer(x + h)[0] - layer(x - h)[0]) / (2 * h)
    torch.testing.assert_close(got["jvp"], slope, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(got["grad of grad"]).all()

    layer.impl = "chunked"
    for what, f in functions(layer).items():
        try:
            f(x)
        except ImplError as error:
            assert "impl 'chunked' cannot run inside torch.func" in str(error), what
            assert str(error).endswith("use impl 'recurrent'") and "\n" not in str(error)


@pytest.mark.parametrize("name", ["gated_delta", "linear", "mesa", "titans", "forgetting"])
def test_no_second_derivative_is_left_out_without_a_word(name: str) -> None:
    """Also where the incoming gradient is a constant."""
    layer = layer_of(name, impl="chunked").double()
    x = torch.randn(B, 7, D, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ImplError, match="use impl 'recurrent'"):
        torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    layer.impl = "recurrent"
    (g,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    assert torch.autograd.grad(g.square().sum(), x)[0].abs().max() > 0
