"""A benchmark of one layer at one length: ours beside its peers, measure by measure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from layerzoo.layer import Layer
from layerzoo.ops import ImplError
from layerzoo.registry import build
from layerzoo.spec import SpecError

from .calls import MEASURES, STEPS, arm_of, call_of, cut, disagreement
from .measure import Spread, alternate, gflops, peak_bytes, ratios, spread, stopwatch
from .peers import Contender, Peer, Unfit, peers_of

OURS = "layerzoo"
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Relative difference that a peer of the same function may have; 1e-3 in wider dtypes."""


@dataclass(frozen=True)
class BenchSettings:
    """What all rows of a benchmark share. mode: ops or layers. tokens: of all rows of a batch
    together, in place of `batch`. against: names of peers, None for all that fit and can run."""

    mode: str
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    batch: int = 2
    tokens: int | None = None
    heads: int = 4
    dim: int = 256
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    impl: str = "auto"
    compiled: bool = False
    repeats: int = 10
    measures: tuple[str, ...] = tuple(MEASURES)
    against: tuple[str, ...] | None = None

    def wants(self, peer: Peer) -> bool:
        return self.against is None or peer.name in self.against

    def at(self, T: int) -> BenchSettings:
        """With the batch of rows of T tokens."""
        return self if self.tokens is None else replace(self, batch=max(1, self.tokens // T))


@dataclass(frozen=True)
class BenchRow:
    """One measure of one implementation at one length; None is what it does not have.

    times: of each repeat, ms a call (decode: a call is one token of every row). us_per_token: of
    the median time. ratio: this time over ours in each pair. gflops: 10^9 FLOPs a second, of the
    rule's definition. moved: bytes that any implementation of an op must move, `bytes_of`. batch:
    rows. peak: bytes. difference: of a peer's output from ours, relative; None for
    a yardstick, which computes something else. ran: which implementations of our ops.
    """

    layer: str
    T: int
    measure: str
    impl: str
    yardstick: bool
    times: list[float]
    ms: Spread | None = None
    us_per_token: float | None = None
    ratio: Spread | None = None
    gflops: float | None = None
    moved: int | None = None
    batch: int | None = None
    peak: int | None = None
    difference: float | None = None
    ran: list[str] | None = None


def bench(
    spec: dict[str, Any], label: str, T: int, settings: BenchSettings, skipped: dict[str, None]
) -> list[BenchRow]:
    """All rows of a layer at a length. Peers that cannot run are added to `skipped`, with
    the reason.

    Raises:
        SpecError: a spec that cannot be built, or a peer asked for by name that cannot run.
        ImplError: an impl of ours that cannot run, or a peer that computes something else.
    """
    torch.manual_seed(0)
    settings = settings.at(T)
    exact = torch.float64 if settings.dtype == torch.float64 else torch.float32
    if settings.device.type == "cuda":
        exact = settings.dtype  # of kernels that have no other
    layer = build(spec, dim=settings.dim).to(settings.device, exact)
    layer.impl, layer.compiled = settings.impl, settings.compiled
    x = torch.randn(settings.batch, T, settings.dim, device=settings.device, dtype=exact)
    ours, theirs = contenders_of(layer, x, label, settings, skipped)
    differences = {peer.name: error for peer, (_, error) in theirs.items()}
    if settings.dtype != exact:  # in which they were compared
        layer, x = layer.to(settings.dtype), x.to(settings.dtype)
        ours, theirs = contenders_of(layer, x, label, settings, skipped, compare=False)
    ran = implementations(layer, ours)
    arms = {OURS: ours, **{peer.name: arm for peer, (arm, _) in theirs.items()}}
    yardsticks = {peer.name for peer in theirs if not peer.same_as(layer.name)}
    rows: list[BenchRow] = []
    for measure in settings.measures:
        flops = flops_of(layer, settings, measure, T)
        counted = settings.mode == "ops" and settings.device.type == "cuda"
        moved = bytes_of(layer, ours, measure) if counted else None
        for name, fields in measured(arms, measure, T, settings).items():
            if flops and fields["times"] and name not in yardsticks:
                fields["gflops"] = gflops(flops, fields["ms"].median)
            if fields["times"] and name not in yardsticks:
                fields["moved"] = moved
            rows.append(
                BenchRow(
                    label,
                    T,
                    MEASURES[measure],
                    name,
                    name in yardsticks,
                    batch=settings.batch,
                    difference=differences.get(name),
                    ran=ran if name == OURS else None,
                    **fields,
                )
            )
    return rows


def implementations(layer: Layer, arm: Contender) -> list[str]:
    """What `auto` chose."""
    ops = layer.ops()
    before = [set(op.used) for op in ops]
    for op in ops:
        op.used.clear()
    with torch.no_grad():
        arm.run(arm.tensors, None)
    ran = sorted({name for op in ops for name in op.used})
    for op, used in zip(ops, before, strict=True):
        op.used |= used
    return ran


def contenders_of(
    layer: Layer,
    x: Tensor,
    label: str,
    settings: BenchSettings,
    skipped: dict[str, None],
    compare: bool = True,
) -> tuple[Contender, dict[Peer, tuple[Contender, float | None]]]:
    """Our arm, and those of the peers that run, with their difference from ours."""
    ours = arm_of(layer, x, settings.mode)
    if ours is None:
        raise SpecError(f"{label}: has no rule to time alone; use `layerzoo bench layers`")
    theirs: dict[Peer, tuple[Contender, float | None]] = {}
    tolerance = TOLERANCE.get(x.dtype, 1e-3)
    kind = settings.device.type
    for peer in filter(settings.wants, peers_of(settings.mode, layer.name, kind)):
        error = None
        try:
            arm, failures = peer_arm(peer, layer, ours, settings)
            if compare and peer.same_as(layer.name):
                error = disagreement(ours, arm)
        except Unfit as reason:
            if settings.against is not None:
                raise SpecError(f"--against {peer.name}: {label}: {reason}") from None
            failures = {"": str(reason)}
            arm = None
        for measure, reason in failures.items():
            who = peer.name if peer.absent() else f"{peer.name} of {label}"
            skipped[f"{who}, {measure}: {reason}" if measure else f"{who}: {reason}"] = None
        if arm is None:
            continue
        if error is not None and not error <= tolerance:
            raise ImplError(
                f"peer {peer.name} computes something else than {label}: relative difference "
                f"{error:.1e} at T {x.shape[1]}; leave it out with --against"
            )
        theirs[peer] = arm, error
    return ours, theirs


def peer_arm(
    peer: Peer, layer: Layer, ours: Contender, settings: BenchSettings
) -> tuple[Contender, dict[str, str]]:
    """A peer that has run once, and why it fails in some measures.

    Raises:
        Unfit: it is not installed, or cannot run on this input.
    """
    if reason := peer.absent():
        raise Unfit(reason)
    failures, ran = dict[str, str](), False
    try:
        arm = peer.build(layer, ours.tensors)
        for measure in settings.measures:
            try:
                if call := call_of(arm, measure):
                    call()
                    ran = True
            except Exception as error:  # whatever another library raises
                failures[measure] = failed(error)
    except Unfit:
        raise
    except Exception as error:  # on input it was not made for
        raise Unfit(failed(error)) from error
    if failures and not ran:
        raise Unfit(next(iter(failures.values())))
    return replace(arm, without=tuple(failures)), failures


def failed(error: Exception) -> str:
    what = (str(error).splitlines() or [""])[0]
    return f"it fails with {type(error).__name__}: {what}"


def measured(
    arms: dict[str, Contender], measure: str, T: int, settings: BenchSettings
) -> dict[str, dict[str, Any]]:
    """The fields of each arm's row; its `times` are empty where it has no such measure."""
    calls = {name: call for name, arm in arms.items() if (call := call_of(arm, measure))}
    seconds = alternate(list(calls.values()), settings.repeats, stopwatch(settings.device))
    one_token = measure == "decode"
    steps, tokens = (STEPS, settings.batch) if one_token else (1, settings.batch * T)
    found: dict[str, dict[str, Any]] = {name: {"times": []} for name in arms}
    for (name, call), times in zip(calls.items(), seconds, strict=True):
        ms = [1e3 * s / steps for s in times]
        found[name] = {
            "times": ms,
            "ms": spread(ms),
            "us_per_token": 1e3 * spread(ms).median / tokens,
            "ratio": ratios(found[OURS]["times"], ms) if name != OURS else None,
        }
        if measure in ("forward", "backward"):
            found[name]["peak"] = peak_bytes(call, settings.device)
    return found


def flops_of(layer: Layer, settings: BenchSettings, measure: str, T: int) -> float | None:
    """FLOPs of a call by the rule's definition, whatever the chunk; with the backward three times
    those of the forward. A decoded token's are not told apart from the mean."""
    if measure == "decode":
        return None
    a_token = layer.rule_flops(T) if settings.mode == "ops" else layer.flops_per_token(T)
    return a_token * settings.batch * T * (3 if measure == "backward" else 1)


@torch.no_grad()
def bytes_of(layer: Layer, arm: Contender, measure: str) -> int | None:
    """Bytes that a call of an op moves at the least, each once: forward, its inputs and output;
    with the backward, the inputs again, the output's gradient and those of the inputs. A decoded
    token: what the state holds, read, and written where it changed (a cache is only read)."""
    o, before = arm.run(arm.tensors, None)
    inputs = sum(t.nbytes for t in arm.tensors.values())
    if measure == "forward":
        return inputs + o.nbytes
    if measure == "backward":
        return 3 * inputs + 2 * o.nbytes
    if measure != "decode" or arm.step is None:
        return None
    _, after = arm.step(cut(arm.tensors, 0, 1), before)
    kept = {x.data_ptr() for x in tree_leaves(before)}
    leaves = [x for x in tree_leaves(after) if x.is_floating_point()]
    written = layer.kind != "attention"
    return sum(x.nbytes * (1 + (written and x.data_ptr() not in kept)) for x in leaves)
