"""Laws of a sequence mixer: what its outputs and its states depend on."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from layerzoo.memory import Memory, map_write
from layerzoo.registry import get_layer
from layerzoo.testing.cases import (
    EXACT,
    LONG,
    ROUNDED,
    SHORT,
    SMALL,
    LayerCase,
    in_pieces,
    is_wide,
    tokens,
    whole,
)
from layerzoo.testing.check import Law, laws, require, require_close

LAWS: list[Law] = []
law = laws(LAWS)

CAUSAL_T = 40


@law(
    "an init_state that differs from what forward starts with, or a forward that needs tokens",
    applies=is_wide,
)
def shapes(case: LayerCase) -> None:
    """Outputs are like x for any number of tokens, none included; no state is `init_state`, and
    no tokens leave a state as it was."""
    layer = case.build()
    for T in (0, 1, SHORT):
        x = tokens(2, T)
        found = whole(layer, x)
        y = found["output"]
        like = y.shape == x.shape and y.dtype == x.dtype
        require(like, f"output is {[*y.shape]} of {y.dtype} for x {[*x.shape]} of {x.dtype}")
        begun = whole(layer, x, layer.init_state(2))
        require_close(found, begun, EXACT, f"{T} tokens, without a state and from init_state")
        if T == 0:
            start = {"output": y, "state": layer.init_state(2)}
            require_close(found, start, EXACT, "0 tokens, against init_state")
    x, state = tokens(2, SHORT), found["state"]
    empty = {"output": x[:, :0], "state": state}
    require_close(whole(layer, x[:, :0], state), empty, EXACT, f"0 tokens after {SHORT}")
    pairs = zip(tree_leaves(layer.init_state(2)), tree_leaves(state), strict=True)
    moved = any(a.shape != b.shape or not a.equal(b) for a, b in pairs)
    require(moved, f"the state is still init_state after {SHORT} tokens")


@law("a state in the dtype of x; make it with Memory.accumulator, or in float32")
def state_dtype(case: LayerCase) -> None:
    """States are of float32, or of float64 in a float64 layer, also under autocast; a cache of an
    attention layer may be as its keys are."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        autocast = dtype == torch.bfloat16
        wide = torch.float32 if autocast else dtype
        if wide == torch.float64 and not is_wide(case):
            continue  # a kernel may refuse float64
        layer, x = case.build(wide), tokens(2, SHORT, wide).to(case.device)
        with torch.autocast(case.device, torch.bfloat16, enabled=autocast):
            found = in_pieces(layer, x, [SHORT - 3, 3])
        where = f"{str(dtype)[6:]}{' by autocast' if autocast else ''}"
        got = found["output"].dtype
        require(got == dtype, f"{where}: output is {got}")
        dtypes = {leaf.dtype for leaf in tree_leaves(found["state"]) if leaf.is_floating_point()}
        allowed = {wide} if layer.kind == "memory" else {wide, dtype}
        names = ", ".join(sorted(map(str, dtypes - allowed)))
        require(dtypes <= allowed, f"{where}: the state has {names}")


STATE = (
    "something of the past that is not in the state, or a write before or after its turn (a "
    "position, the inputs of a convolution, a mini-batch that is not full)"
)


@law(STATE, applies=is_wide)
def pieces(case: LayerCase) -> None:
    """A sequence run in pieces gives the outputs and the final state of the whole sequence."""
    layer, x = case.build(), tokens(2, SHORT)
    want = whole(layer, x)
    # Token by token, `recurrent` has met every boundary; a few more are enough.
    places = range(1, SHORT, 3) if case.impl == "recurrent" else range(SHORT + 1)
    splits = [[at, SHORT - at] for at in places]
    for n, sizes in enumerate(([1] * SHORT, [7, 0, SHORT - 7], [0, 0, SHORT], *splits)):
        with torch.set_grad_enabled(n < 3):  # a layer may run otherwise where it need not train
            found = in_pieces(layer, x, sizes)
        require_close(found, want, ROUNDED, f"pieces {sizes}")


def _has_chunks(case: LayerCase) -> bool:
    return is_wide(case) and case.impl != "recurrent"


@law(f"{STATE}, or a chunk that does not start where the last one ended", applies=_has_chunks)
def long_pieces(case: LayerCase) -> None:
    """A sequence longer than a chunk, run in pieces, gives what the whole sequence gives."""
    layer, x = case.build(), tokens(2, LONG)
    want = whole(layer, x)
    for sizes in ([1, LONG - 1], [LONG - 1, 1], [64, LONG - 64], [33, 0, 10, LONG - 43]):
        require_close(in_pieces(layer, x, sizes), want, ROUNDED, f"pieces {sizes}")


@law("an update of the state in place, or a state that is not detached", applies=is_wide)
def rollback(case: LayerCase) -> None:
    """`forward` leaves the state that it is given as it was, with gradients and without, and a
    state keeps no graph where gradients are off."""
    layer, x = case.build(), tokens(2, SHORT)
    want = in_pieces(layer, x, [9, SHORT - 9])
    want["output"] = want["output"][:, 9:]
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        where = f"in torch.{mode.__name__}"
        with mode():
            _, state = layer(x[:, :9])
            before = {"state": tree_map(torch.clone, state)}
            first = whole(layer, x[:, 9:], state)
            for t in range(3):  # another branch: an append in place must not reach the first one
                layer(-x[:, t : t + 1], state)
                require_close({"state": state}, before, EXACT, f"{where}, the state given")
            again = whole(layer, x[:, 9:], state)
            require_close(again, first, EXACT, f"{where}, the state used again")
            recorded = any(leaf.requires_grad for leaf in tree_leaves((state, first)))
            held = "the state keeps a graph" if recorded else "nothing takes a gradient"
            require(recorded == torch.is_grad_enabled(), f"{where}: {held}")
            copied = whole(layer, x[:, 9:], before["state"])
            require_close(first, copied, EXACT, f"{where}, a copy of the state")
            require_close(first, want, ROUNDED, f"{where}, the rest of a sequence")


@law("a sum over all tokens, a mask that is off by one, or a norm over time", applies=is_wide)
def causal(case: LayerCase) -> None:
    """A token changes no output before its own, and changes its own or a later one."""
    layer, T = case.build(), CAUSAL_T
    x = tokens(1, T).repeat(T + 1, 1, 1)  # row t perturbs token t; the last row is left alone
    x[range(T), range(T)] += tokens(1, T + 1)[0, :T]
    y, _ = layer(x)
    for t in range(T):
        change = (y[t] - y[T]).abs().amax(-1)
        early = (change[:t] > SMALL).nonzero().flatten().tolist()
        require(not early, f"token {t} changes the outputs of tokens {early}")
        require(change[t:].max() > 1e-6, f"token {t} changes no output")


@law("a mean over the batch, or rows that share a state", applies=is_wide)
def rows(case: LayerCase) -> None:
    """A sequence gives the same alone as in a batch."""
    layer, x = case.build(), tokens(3, SHORT)
    batch = in_pieces(layer, x, [11, 9])
    for row in range(3):
        alone = in_pieces(layer, x[row : row + 1], [11, 9])
        state = tree_map(lambda s, row=row: s[row : row + 1] if s.dim() else s, batch["state"])
        mine = {"output": batch["output"][row : row + 1], "state": state}
        require_close(alone, mine, 1e-11, f"row {row} of 3")


@law("an entry of the state that is not a tensor, or a buffer that is not saved", applies=is_wide)
def saved_state(case: LayerCase) -> None:
    """A state that was saved and loaded continues as it would have."""
    layer, x = case.build(), tokens(2, SHORT)
    _, state = layer(x[:, :11])
    file = io.BytesIO()
    torch.save(tree_map(torch.detach, state), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    require_close(whole(again, x[:, 11:], loaded), whole(layer, x[:, 11:], state), EXACT)


def _is_memory(case: LayerCase) -> bool:
    return is_wide(case) and issubclass(get_layer(case.name), Memory)


@law(
    "queries and writes that are aligned at their first tokens, or a read that changes the state",
    applies=_is_memory,
)
def alignment(case: LayerCase) -> None:
    """In `mix` the last query meets the last write; earlier queries read the incoming state, and
    earlier writes are written all the same."""
    layer: Any = case.build()
    with torch.no_grad():
        _, state = layer(tokens(2, SHORT))
        for reads, writes in ((9, 5), (9, 0), (5, 9), (0, 9), (0, 0), (1, 4)):
            _aligned(layer, state, reads, writes)


def _aligned(layer: Any, state: Any, reads: int, writes: int) -> None:
    q, write = layer.project(tokens(2, 9))
    q, write = q[:, 9 - reads :], map_write(lambda w: w[:, 9 - writes :], write)
    got = dict(zip(("output", "state"), layer.mix(q, write, state), strict=True))

    def at(x: Tensor, n: int) -> Tensor:
        """Token n of the longer of the two, empty where the shorter one has not begun."""
        n -= length - x.shape[1]
        return x[:, n : n + 1] if n >= 0 else x[:, :0]

    length, before, outputs = max(reads, writes), state, [got["output"][:, :0]]
    for n in range(length):
        o, state = layer.mix(at(q, n), map_write(functools.partial(at, n=n), write), state)
        outputs.append(o)
    where = f"{reads} queries and {writes} writes"
    want = {"output": torch.cat(outputs, 1), "state": state}
    require_close(got, want, ROUNDED, f"{where}, against token by token")
    unread = {"state": layer.mix(q[:, :0], write, before)[1]}
    require_close(unread, {"state": got["state"]}, ROUNDED, f"{where}, against writes alone")
    if not writes:
        require_close({"state": got["state"]}, {"state": before}, EXACT, where)
