"""The delta rule's kernels, against the recurrent form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from layerzoo.memories.delta.rule import OP, delta_rule
from layerzoo.ops import ImplError

pytestmark = pytest.mark.usefixtures("solves_in_float32")
GPU = torch.cuda.is_available()

CASES: dict[str, tuple[int, int, int, int, int, str]] = {
    "one token": (2, 1, 2, 16, 16, "scalar"),
    "below a chunk": (2, 9, 2, 16, 16, "none"),
    "a chunk": (1, 32, 1, 16, 16, "scalar"),
    "chunks and a rest": (1, 75, 2, 16, 32, "scalar"),
    "odd channels": (2, 37, 1, 5, 19, "constant"),
    "resets": (1, 70, 2, 32, 16, "resets"),
    "no decay": (1, 70, 1, 16, 64, "none"),
    "many heads": (1, 75, 4, 16, 16, "scalar"),
    "channels": (1, 75, 2, 16, 32, "vector"),
    "odd channels, decayed": (2, 9, 1, 5, 19, "vector"),
    "resets of channels": (1, 70, 1, 16, 16, "vector resets"),
}
if GPU:
    CASES |= {
        f"{heads} heads of {D}, {decay}": (2, T, heads, D, D, decay)
        for heads, T in ((3, 300), (64, 150))  # a few, and enough to fill the machine
        for D in (64, 128)
        for decay in ("none", "scalar", "resets", "vector", "vector resets")
    }


def arguments(B: int, T: int, H: int, K: int, V: int, decay: str, state: bool = True) -> Any:
    generator = torch.Generator().manual_seed(T + K)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    args = {
        "q": normal(B, T, H, K),
        "k": F.normalize(normal(B, T, H, K), dim=-1),
        "v": normal(B, T, H, V),
        "beta": 2 * normal(B, T, H).sigmoid(),
    }
    if state:
        args["state"] = normal(B, H, K, V)
    if decay == "constant":
        args["log_decay"] = -normal(H).abs() / 10
    elif decay != "none":
        channels = (K,) if "vector" in decay else ()
        args["log_decay"] = -0.2 * normal(B, T, H, *channels).abs()
    if "resets" in decay:
        args["log_decay"][:, ::7] = -60.0
        args["beta"][:, ::5] = 0
    return args


def call(impl: str, *, q: Any, k: Any, v: Any, beta: Any, log_decay: Any = None, **kwargs: Any):
    return delta_rule(q, k, v, beta, log_decay, scale=0.3, impl=impl, **kwargs)


WIDE = ("beta", "log_decay", "state")


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(judge: Any, case: str) -> None:
    judge(OP, call, arguments(*CASES[case]), wide=WIDE)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
@pytest.mark.parametrize(
    ("heads", "decay"), [(2, "none"), (4, "scalar"), (2, "resets"), (4, "vector")]
)
def test_chunks_of_16_bits(judge: Any, heads: int, decay: str) -> None:
    """Which are longer; and of float16 the interpreter takes care."""
    judge(OP, call, arguments(1, 150, heads, 16, 32, decay), wide=WIDE)


@pytest.mark.parametrize("decay", ["none", "constant", "scalar", "vector"])
def test_a_decode_step(judge: Any, decay: str) -> None:
    judge(OP, call, arguments(3, 1, 2, 16, 33, decay), wide=WIDE, grad=False)


def test_without_a_state(judge: Any) -> None:
    judge(OP, call, arguments(1, 40, 2, 16, 16, "scalar", state=False), wide=WIDE)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_same_key_again_and_again(judge: Any, beta: float) -> None:
    """Here powers of A grow beyond any digits, and its inverse does not."""
    args = arguments(1, 64, 1, 16, 16, "none")
    args["k"] = args["k"][:, :1].expand(1, 64, 1, 16)
    args["beta"] = torch.full_like(args["beta"], beta)
    judge(OP, call, args, wide=WIDE)


def given(args: Any, device: torch.device) -> Any:
    return {name: x.to(device, torch.float32) for name, x in args.items()}


@pytest.mark.parametrize("cut", [1, 32, 33])
def test_pieces_with_states_equal_the_whole(poison: None, device: Any, cut: int) -> None:
    args = given(arguments(1, 50, 2, 16, 16, "scalar"), device)
    before = args["state"].clone()
    whole, end = call("triton", **args)
    args.pop("state")
    first, state = call("triton", **{n: x[:, :cut] for n, x in args.items()}, state=before)
    parts = [first]
    for t in range(cut, 50, 9):
        piece = {n: x[:, t : t + 9] for n, x in args.items()}
        o, state = call("triton", **piece, state=state)
        parts.append(o)
    o, same = call("triton", **{n: x[:, :0] for n, x in args.items()}, state=state)
    assert o.shape == (1, 0, 2, 16)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    for got in (state, same):
        torch.testing.assert_close(got, end, rtol=1e-5, atol=1e-5)


def test_decoding_equals_the_whole(poison: None, device: Any) -> None:
    args = given(arguments(2, 5, 2, 16, 16, "scalar"), device)
    whole, end = call("triton", **args)
    state = args.pop("state")
    before, outputs = state.clone(), []
    for t in range(5):
        kept = state
        o, state = call("triton", **{n: x[:, t : t + 1] for n, x in args.items()}, state=state)
        outputs.append(o)
        assert t or torch.equal(kept, before)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-5)


def test_it_says_what_it_does_not_take(device: Any) -> None:
    args = given(arguments(1, 3, 1, 257, 16, "none"), device)
    with pytest.raises(ImplError, match="at most 256 key channels"):
        call("triton", **args)
    args = {name: x.double() for name, x in args.items()}
    with pytest.raises(ImplError, match="float64"):
        call("triton", **args)


def test_no_second_derivative(device: Any) -> None:
    args = given(arguments(1, 5, 1, 16, 16, "scalar"), device)
    args["q"].requires_grad_()
    o, _ = call("triton", **args)
    (grad,) = torch.autograd.grad(o.square().sum(), args["q"], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_torch_compile_sees_one_operator(device: Any) -> None:
    args = given(arguments(1, 20, 1, 16, 16, "scalar"), device)
    for x in args.values():
        x.requires_grad_()
    compiled = torch.compile(
        lambda **kwargs: call("triton", **kwargs), backend="aot_eager", fullgraph=True
    )
    results = []
    for fn in (lambda **kwargs: call("triton", **kwargs), compiled):
        o, end = fn(**args)
        grads = torch.autograd.grad(o.sum() + end.square().sum(), list(args.values()))
        results.append((o, end, *grads))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_autocast_changes_nothing(device: Any) -> None:
    args = given(arguments(1, 20, 1, 16, 16, "scalar"), device)
    want, _ = call("triton", **args)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got, _ = call("triton", **args)
    assert torch.equal(got, want)
