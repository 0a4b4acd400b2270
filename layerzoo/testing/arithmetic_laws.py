"""Laws of a layer's arithmetic: its gradients, implementations, gates, precision and costs."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from layerzoo.layer import Layer, Reduction
from layerzoo.registry import build, get_layer
from layerzoo.testing.cases import (
    DIM,
    LONG,
    ROUNDED,
    SHORT,
    SMALL,
    LayerCase,
    add_noise,
    in_pieces,
    is_wide,
    tokens,
)
from layerzoo.testing.check import Broken, Law, laws, named, require, require_close
from layerzoo.testing.precision import DRAWS, Error, check_precision, errors

LAWS: list[Law] = []
law = laws(LAWS)

PRECISION_T = 80
"""Tokens: a chunk of 64, and a rest."""


def weighted(tree: Any) -> Tensor:
    """A loss to which every floating-point entry contributes with a weight of its own."""
    leaves = [x for x in tree_leaves(tree) if x.is_floating_point()]
    sums = [(x * torch.linspace(-1, 2, x.numel()).to(x).view_as(x)).sum() for x in leaves]
    return torch.stack(sums).sum()


@law(
    "a field that the config's to_fields or from_fields loses, or a name that is not set",
    once=lambda case: (case.name, case.n),
)
def registered(case: LayerCase) -> None:
    """A layer has a kind, and its spec builds it again, also after a way through JSON."""
    cls, layer = get_layer(case.name), build(case.name, dim=DIM, **case.spec)
    kinds = ("memory", "attention", "composition")
    require(cls.kind in kinds, f"kind is '{cls.kind}', and should be one of {', '.join(kinds)}")
    again = build(json.loads(json.dumps(layer.spec())), dim=DIM)
    require(again.spec() == layer.spec(), f"{layer.spec()} builds {again.spec()}")
    require(again.config == build(layer.spec(), dim=DIM).config, "JSON changes the config")
    require(type(again) is cls, f"the spec builds a {type(again).__name__}")
    mine, theirs = again.state_dict().keys(), layer.state_dict().keys()
    require(mine == theirs, f"the layer built again has other parameters: {mine ^ theirs}")


@law("a parameter that forward does not use, or a detach", applies=is_wide)
def gradients(case: LayerCase) -> None:
    """Every parameter gets a finite gradient."""
    layer, x = case.build(), tokens(2, SHORT)
    weighted(in_pieces(layer, x, [11, 9])["output"]).backward()
    for name, p in layer.named_parameters():
        if p.grad is None:
            raise Broken(f"{name} has no gradient")
        require(torch.isfinite(p.grad).all(), f"the gradient of {name} is not finite")


def outcome(
    layer: Layer,
    dtype: torch.dtype = torch.float64,
    autocast: bool = False,
    past: int = 37,
    length: int = LONG,
) -> dict[str, Any]:
    """Output, final state and every gradient (of parameters, x and the incoming state) of a
    sequence in two pieces, after `past` tokens whose state takes a gradient itself."""
    device = next(layer.parameters()).device
    x = tokens(2, length, dtype).to(device).requires_grad_()
    first = 2 * length // 5
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            _, state = layer(tokens(2, past, dtype).to(device))
        state = tree_map(lambda s: s.requires_grad_() if s.is_floating_point() else s, state)
        found = in_pieces(layer, x, [first, length - first], state)
    inputs: dict[str, Tensor] = {**dict(layer.named_parameters()), "x": x}
    leaves = [s for s in tree_leaves(state) if s.is_floating_point()]
    inputs |= {f"the incoming state, tensor {n}": s for n, s in enumerate(leaves)}
    grads = torch.autograd.grad(weighted(found), [*inputs.values()], materialize_grads=True)
    found |= {f"gradient of {name}": g for name, g in zip(inputs, grads, strict=True)}
    return tree_map(torch.detach, found)


@law(
    "a chunk's last tokens, a decay that is applied once too often or too seldom, or a term that "
    "is missing in a backward pass",
    applies=lambda case: case.impl == "chunked",
)
def implementations(case: LayerCase) -> None:
    """`chunked` is the function that `recurrent` is: outputs, final state and gradients."""
    for past, length in ((0, LONG), (37, 2 * SHORT)):  # sinks and warm-ups are of the start
        run = functools.partial(outcome, past=past, length=length)
        want = run(case._replace(impl="recurrent").build())
        where = f"chunked against recurrent, {length} tokens after {past}"
        require_close(run(case.build()), want, ROUNDED, where)


def _reduces(case: LayerCase) -> bool:
    return is_wide(case) and case.n == 0 and bool(get_layer(case.name).reductions)


@law("a gate whose neutral value is not what the reduction's `neutral` sets", applies=_reduces)
def reductions(case: LayerCase) -> None:
    """A gate at its neutral value is the rule without the gate, and elsewhere it is not."""
    for reduction in get_layer(case.name).reductions:
        specs = ({"name": case.name, **spec} for spec in (reduction.spec, reduction.parent))
        gated, parent = (build(spec, dim=DIM).double() for spec in specs)
        gated.impl = parent.impl = case.impl
        add_noise(parent)
        add_noise(gated)  # a gate may start at its neutral value
        gated.load_state_dict(parent.state_dict(), strict=False)
        x, where = tokens(2, LONG), f"{reduction.spec} against {reduction.parent}"
        want = in_pieces(parent, x, [30, LONG - 30])["output"]
        if reduction.neutral is not Reduction._field_defaults["neutral"]:
            changes = (gated(x)[0] - want).abs().max() > 1e-6
            require(changes, f"{where}: the gate changes nothing where it is not neutral")
        reduction.neutral(gated)
        got = in_pieces(gated, x, [30, LONG - 30])["output"]
        require_close({"output": got}, {"output": want}, SMALL, where)


@law(
    "a tensor that state_bytes forgets, or a view of a larger one (make it contiguous)",
    applies=is_wide,
)
def state_bytes(case: LayerCase) -> None:
    """`state_bytes` is the size of the state, in float32."""
    layer = case.build(torch.float32)
    for T in (1, 3, 40):
        leaves = tree_leaves(layer(tokens(1, T, torch.float32))[1])
        size, held = layer.state_bytes(T).total, sum(leaf.nbytes for leaf in leaves)
        require(held == size, f"after {T} tokens the state has {held} bytes, not {size}")
        if T == 40:
            kept = sum(leaf.untyped_storage().nbytes() for leaf in leaves)
            # Slack, in which a cache may append.
            require(kept <= 2 * size, f"a state of {size} bytes keeps {kept} in memory")


@law(
    "a matrix product that rule_flops leaves out or counts twice",
    applies=lambda case: case.impl in ("recurrent", "auto"),
)
def flops(case: LayerCase) -> None:
    """`flops_per_token` is the number of FLOPs of matrix products that are measured."""
    layer = case.build()
    solves = {
        torch.ops.aten._linalg_solve_ex: lambda A, *_, **__: A[:-2].numel() * 2 * A[-1] ** 3 / 3
    }
    for T in (1, 3, SHORT + 1):
        with FlopCounterMode(display=False, custom_mapping=solves) as counter, torch.no_grad():
            layer(tokens(1, T))
        measured, told = counter.get_total_flops() / T, layer.flops_per_token(T)
        close = abs(told - measured) <= 1e-6 * measured
        require(close, f"of {T} tokens flops_per_token is {told:g}, and measured are {measured:g}")


def _is_first(case: LayerCase) -> bool:
    return case.n == 0 and case.impl in ("chunked", "auto")


@law(
    "a branch on the values of a tensor, or an autograd function",
    applies=_is_first,
    slow=True,
    once=lambda case: case.op,
)
def compiles(case: LayerCase) -> None:
    """What torch.compile captures, whatever a backend makes of it, is the function as it is."""
    layer, x = case.build(), tokens(2, SHORT)
    torch.compiler.reset()
    compiled: Any = torch.compile(layer, backend="eager", dynamic=False)
    sizes = [SHORT // 2, SHORT // 2]  # of equal length, to compile less
    with torch.no_grad():
        got = in_pieces(compiled, x, sizes, layer.init_state(2))
        require_close(got, in_pieces(layer, x, sizes), SMALL, "compiled against eager")


@functools.lru_cache(DRAWS)
def _exact(case: LayerCase, draw: int) -> dict[str, Tensor]:
    layer = case._replace(impl="recurrent").build(draw=draw)
    return named(outcome(layer, length=PRECISION_T))


def wrong(case: LayerCase, kind: str, draw: int) -> dict[str, Error]:
    """The error of output, state and gradients of a case in a precision, float32 or bfloat16."""
    want = _exact(case._replace(impl=""), draw)
    want = {name: x for name, x in want.items() if x.is_floating_point()}
    layer = case.build(torch.float32, draw)
    low = kind == "bfloat16"
    got = named(outcome(layer, torch.float32, autocast=low, length=PRECISION_T))
    return errors({name: got[name] for name in want}, want)


def _is_fast(case: LayerCase) -> bool:
    """Precision is of the op, and not of the specs: the first case stands for all."""
    return case.n == 0 and case.impl in ("chunked", "triton")


@law(
    "a sum in the dtype of x, a missing upcast, or an exponential of a large number",
    _is_fast,
    slow=True,
)
def precision(case: LayerCase) -> None:
    """In float32, and in bfloat16 by autocast, an implementation is wrong by at most twice what
    `recurrent` is wrong by."""
    specification, draws = case._replace(impl="recurrent"), range(DRAWS)
    for kind in ("float32", "bfloat16"):
        made, reference = (
            [wrong(run, kind, draw) for draw in draws] for run in (case, specification)
        )
        try:
            check_precision(made, reference)
        except Broken as error:
            raise Broken(f"{kind}: {error}") from None
