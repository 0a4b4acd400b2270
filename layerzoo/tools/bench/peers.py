"""Peers: implementations from other libraries that `layerzoo bench` runs beside ours.

The files of `adapters/` register them. What a peer needs is imported only when it is built.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from layerzoo.layer import Layer, State
from layerzoo.registry import get_layer
from layerzoo.spec import SpecError, suggest

Tensors = dict[str, Tensor]
Run = Callable[[Tensors, State], tuple[Tensor, State]]

PEERS: list[Peer] = []
EVERY = ("*",)
"""Of a peer's layers: all of them."""
INSTALL = "pip install 'layerzoo[bench]'"


class Unfit(Exception):
    """A peer that cannot run here: the message says why."""


@dataclass(frozen=True)
class Contender:
    """One implementation, ready to run.

    run: of all tokens, from a state or None. tensors: its input, named, `[B, T, ...]`, prepared
    outside of the timing. parameters: what else gets a gradient. step: of one token, from a state
    that `run` or `step` returned (whose memory it may use again); None if it has none. carries:
    `run` continues from such a state, too, so that a long prefill can go in pieces. without:
    measures that failed.
    """

    run: Run
    tensors: Tensors
    parameters: tuple[Tensor, ...] = ()
    step: Run | None = None
    carries: bool = False
    without: tuple[str, ...] = ()


Build = Callable[[Layer, Tensors], Contender]


@dataclass(frozen=True)
class Peer:
    """An adapter.

    name: for --against; several peers may share one, if no layer has two of them. mode: ops or
    layers. layers: those that it computes the same function as, which is checked. beside: kinds
    of layer beside which it is a yardstick: another function of the same shapes. module, library:
    what must be importable, and its distribution. device: cpu or cuda, if it is for one of them
    alone; a name may stand for one peer on each. build: from a layer of ours and its input (of its
    op, or {x}); raises `Unfit`.
    """

    name: str
    mode: str
    build: Build
    layers: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    module: str = ""
    library: str = ""
    device: str = ""

    def same_as(self, layer: str) -> bool:
        return layer in self.layers or self.layers == EVERY

    def runs_on(self, device: str) -> bool:
        return self.device in ("", device)

    def fits(self, layer: str) -> bool:
        return self.same_as(layer) or get_layer(layer).kind in self.beside

    def absent(self) -> str | None:
        """Why its library cannot be imported, and the way out."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"{self.library} is not installed; {INSTALL}"
        return None


def peer(name: str, mode: str, **fields: Any) -> Callable[[Build], Build]:
    """Decorator: register an adapter under a name, with the fields of `Peer`."""

    def add(build: Build) -> Build:
        new = Peer(name, mode, build, **fields)
        for old in PEERS:
            apart = old.device and new.device and old.device != new.device
            same = (old.name, old.mode) == (name, mode) and set(old.layers) & set(new.layers)
            if same and not apart:
                raise TypeError(f"peer '{name}' is already registered for these {mode}")
        PEERS.append(new)
        return build

    return add


def peers_of(mode: str, layer: str, device: str = "cpu") -> list[Peer]:
    """The peers of a layer in a mode on a device, one a name: the same function goes before a
    yardstick."""
    found: dict[str, Peer] = {}
    for p in sorted(PEERS, key=lambda p: not p.same_as(layer)):
        if p.mode == mode and p.fits(layer) and p.runs_on(device):
            found.setdefault(p.name, p)
    return list(found.values())


def choose_peers(
    against: str | None, mode: str, layers: Iterable[str], device: str = "cpu"
) -> tuple[str, ...] | None:
    """The names that --against gives, checked; None is all that fit and are installed.

    Raises:
        SpecError: an unknown peer, or one that fits no layer, is for another device or is not
            installed.
    """
    if against is None:
        return None
    layers = tuple(dict.fromkeys(layers))
    names = tuple(filter(None, (name.strip() for name in against.split(","))))
    if names == ("none",):
        return ()
    for name in names:
        place = f"--against {name}"
        if name not in (known := {p.name for p in PEERS}):
            raise SpecError(f"{place}: unknown peer; {suggest(name, (*known, 'none'))}")
        own = [p for p in PEERS if p.name == name]
        found = [p for p in own if p.mode == mode and any(map(p.fits, layers))]
        if not found:
            fits = (f"{p.mode}: {', '.join(p.layers) or 'any ' + p.beside[0]}" for p in own)
            raise SpecError(
                f"{place}: fits none of {mode}: {', '.join(layers)}; it is for {'; '.join(fits)}"
            )
        if not any(p.runs_on(device) for p in found):
            raise SpecError(f"{place}: runs on {found[0].device} alone; see --device")
        found = [p for p in found if p.runs_on(device)]
        for reason in filter(None, (p.absent() for p in found)):
            raise SpecError(f"{place}: {reason}")
    return names


def load(module: str, *names: str) -> list[Any]:
    """Functions of a peer's module, freed of decorators that dispatch to another one.

    Raises:
        Unfit: the module cannot be imported, or lacks one of them.
    """
    try:
        with warnings.catch_warnings():  # about hardware that this machine lacks
            warnings.simplefilter("ignore")
            found = importlib.import_module(module)
        return [inspect.unwrap(getattr(found, name)) for name in names]
    except (ImportError, AttributeError) as error:
        raise Unfit(f"{module} does not load: {error}".splitlines()[0]) from error


@peer("chunked", "ops", layers=EVERY, device="cuda")
def chunked(layer: Any, tensors: Tensors) -> Contender:
    """Our own portable path, compiled where a layer has something to compile: what kernels must be
    worth."""
    twin = copy.deepcopy(layer)
    twin.impl, twin.compiled = "chunked", True
    inner = twin.inner(next(twin.parameters()).new_zeros(1, 1, twin.dim))
    return Contender(inner.fn, tensors, step=inner.fn, carries=True)
