"""Peers of the benchmarks: which run, which are refused, and that the installed ones agree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerzoo import Layer, SpecError, build, list_layers
from layerzoo.cli import main
from layerzoo.memories.linear.rule import LinearWrite
from layerzoo.tools.bench import calls, measure
from layerzoo.tools.bench.calls import arm_of, call_of, cut, disagreement
from layerzoo.tools.bench.peers import PEERS, Contender, Peer, Unfit, choose_peers, peer, peers_of

TINY = ("--dim", "16", "--heads", "2", "--repeats", "2", "--lengths", "8,16")


@pytest.fixture(autouse=True)
def _small_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "GEMM", 32)


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    """The registered peers, put back as they were; only those of the test fit `linear` ops."""
    list_layers()
    before = list(PEERS)
    PEERS[:] = [p for p in before if not (p.mode == "ops" and p.fits("linear"))]
    yield PEERS
    PEERS[:] = before


def bench(*argv: str) -> int:
    return main(["bench", *argv])


def copy_of_ours(layer: Layer, tensors: dict[str, Tensor]) -> Contender:
    """A peer that computes the same function: our own op."""

    def fn(x: dict[str, Tensor], state: Any) -> tuple[Tensor, Any]:
        given = dict(x)
        state = layer.init_state(len(x["q"])) if state is None else state
        return layer.mix(given.pop("q"), LinearWrite(**given, log_decay=None), state)

    return Contender(fn, tensors, step=fn, carries=True)


def test_the_same_function_goes_before_a_yardstick_of_the_same_name(peers: list[Peer]) -> None:
    peer("mine", "ops", beside=("memory",))(copy_of_ours)
    peer("mine", "ops", layers=("linear",))(copy_of_ours)
    peer("other", "layers", layers=("linear",))(copy_of_ours)
    (mine,) = peers_of("ops", "linear")
    assert mine.same_as("linear")
    assert not next(p for p in peers_of("ops", "delta") if p.name == "mine").same_as("delta")
    assert not any(p.name == "mine" for p in peers_of("ops", "softmax"))
    with pytest.raises(TypeError, match="'mine' is already registered"):
        peer("mine", "ops", layers=("linear", "delta"))(copy_of_ours)


def test_which_peers_run(peers: list[Peer]) -> None:
    peer("mine", "ops", layers=("linear",))(copy_of_ours)
    peer("absent", "ops", layers=("linear",), module="no_such", library="no-such")(copy_of_ours)
    assert choose_peers(None, "ops", ["linear"]) is None
    assert choose_peers("none", "ops", ["linear"]) == ()
    assert choose_peers("mine, mine", "ops", ["linear", "softmax"]) == ("mine", "mine")
    for against, mode, message in (
        ("mime", "ops", "--against mime: unknown peer; did you mean 'mine'?"),
        ("mine", "layers", "--against mine: fits none of layers: linear; it is for ops: linear"),
        ("mine,absent", "ops", "--against absent: no-such is not installed; pip install 'lay"),
    ):
        with pytest.raises(SpecError, match=f"^{message.replace('?', '.')}"):
            choose_peers(against, mode, ["linear"])


def test_a_peer_runs_beside_ours(peers: list[Peer], capsys: Any, tmp_path: Path) -> None:
    def stateless(layer: Layer, tensors: dict[str, Tensor]) -> Contender:
        return replace(copy_of_ours(layer, tensors), step=None, carries=False)

    def other(layer: Layer, tensors: dict[str, Tensor]) -> Contender:
        return Contender(lambda x, state: (x["v"].cumsum(1), None), tensors)

    peer("mine", "ops", layers=("linear",))(copy_of_ours)
    peer("stateless", "ops", layers=("linear",))(stateless)
    peer("yard", "ops", beside=("memory",))(other)
    file = tmp_path / "rows.json"
    assert bench("ops", "linear", *TINY, "--json", str(file)) == 0
    out = capsys.readouterr().out
    assert "skipped" not in out and "yard*" in out
    found = {(r["impl"], r["measure"], r["T"]): r for r in json.loads(file.read_text())["rows"]}
    assert {impl for impl, *_ in found} == {"layerzoo", "mine", "stateless", "yard"}
    for T in (8, 16):
        for name in ("forward", "forward+backward", "prefill", "decode"):
            ours, mine = found["layerzoo", name, T], found["mine", name, T]
            assert ours["ratio"] is None and ours["difference"] is None
            assert mine["difference"] == 0
            pairs = [b / a for a, b in zip(ours["times"], mine["times"], strict=True)]
            assert mine["ratio"]["median"] == pytest.approx(sum(pairs) / 2)
            assert mine["peak"] == ours["peak"]
            none = found["stateless", name, T]
            assert bool(none["times"]) == bool(none["ms"]) == name.startswith("forward")
            assert found["yard", name, T]["gflops"] is None
            assert found["yard", name, T]["difference"] is None
    lines = [line.split() for line in out.splitlines() if " decode " in line]
    assert all(set(cells[4:-1]) == {"-"} for cells in lines if cells[3] == "stateless")


def test_peers_are_compared_in_float32_and_timed_in_the_dtype_asked_for(
    peers: list[Peer], capsys: Any
) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def probe(layer: Layer, tensors: dict[str, Tensor]) -> Contender:
        arm = copy_of_ours(layer, tensors)

        def run(x: dict[str, Tensor], state: Any) -> tuple[Tensor, Any]:
            o, state = arm.run(x, state)
            seen.append((x["q"].dtype, o.dtype))
            return (o if o.dtype == torch.float32 else 2 * o), state

        return replace(arm, run=run, step=None)

    peer("probe", "ops", layers=("linear",))(probe)
    more = ("--dtype", "bfloat16", "--measure", "forward", "--lengths", "8")
    assert bench("ops", "linear", *TINY, *more) == 0
    assert "bfloat16" in capsys.readouterr().out
    timed = seen[seen.index((torch.bfloat16, torch.bfloat16)) :]
    assert set(timed) == {(torch.bfloat16, torch.bfloat16)}
    assert set(seen) - set(timed) == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("where", ["output", "step"])
def test_a_peer_that_computes_something_else_is_refused(
    peers: list[Peer], capsys: Any, where: str
) -> None:
    def wrong(layer: Layer, tensors: dict[str, Tensor]) -> Contender:
        arm = copy_of_ours(layer, tensors)

        def scaled(x: dict[str, Tensor], state: Any) -> tuple[Tensor, Any]:
            o, state = arm.run(x, state)
            return 1.01 * o, state

        return replace(arm, **{"run" if where == "output" else "step": scaled})

    peer("wrong", "ops", layers=("linear",))(wrong)
    for against in ((), ("--against", "wrong")):
        assert bench("ops", "linear", *TINY, *against) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert (
            "peer wrong computes something else than linear: relative difference 1.0e-02" in line
        )
    assert bench("ops", "linear", *TINY, "--against", "none", "--measure", "forward") == 0


def test_a_peer_that_cannot_run_is_skipped_with_a_word(peers: list[Peer], capsys: Any) -> None:
    def unfit(layer: Layer, tensors: dict[str, Tensor]) -> Contender:
        raise Unfit("it needs a blue moon")

    def breaks(layer: Layer, tensors: dict[str, Tensor]) -> Contender:
        return Contender(lambda x, state: (torch.zeros(2) @ torch.zeros(3), None), tensors)

    peer("absent", "ops", layers=("linear",), module="no_such", library="no-such")(copy_of_ours)
    peer("unfit", "ops", layers=("linear",))(unfit)
    peer("breaks", "ops", layers=("linear",))(breaks)
    assert bench("ops", "linear", *TINY, "--measure", "forward") == 0
    skipped = [s for s in capsys.readouterr().out.splitlines() if s.startswith("skipped")]
    assert skipped[0] == (
        "skipped: absent: no-such is not installed; pip install 'layerzoo[bench]'"
    )
    assert skipped[1] == "skipped: unfit of linear: it needs a blue moon"
    assert skipped[2].startswith("skipped: breaks of linear: it fails with RuntimeError: ")
    assert len(skipped) == 3  # once each, not once a length
    for name, message in (
        ("absent", "--against absent: no-such is not installed"),
        ("unfit", "--against unfit: linear: it needs a blue moon"),
        ("breaks", "--against breaks: linear: it fails with RuntimeError"),
    ):
        assert bench("ops", "linear", *TINY, "--against", name) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


list_layers()  # discovers the peers
HERE = [p for p in PEERS if p.runs_on("cpu")]
REAL = [(p, name) for p in HERE for name in (p.layers or ("linear", "gated_delta"))]


@pytest.mark.parametrize(("peer", "name"), REAL, ids=[f"{p.name}-{name}" for p, name in REAL])
def test_the_peers_that_are_installed(peer: Peer, name: str) -> None:
    """Each agrees with ours, with its own one-token form, and with itself in pieces."""
    if reason := peer.absent():
        pytest.skip(reason)
    layer, x = build(name, dim=32, heads=2), torch.randn(2, 128, 32)
    ours = arm_of(layer, x, peer.mode)
    assert ours is not None
    before = {key: t.clone() for key, t in ours.tensors.items()}
    arm = peer.build(layer, ours.tensors)
    for name_of_measure in calls.MEASURES:
        if call := call_of(arm, name_of_measure):
            call()
    if peer.same_as(name):
        # fla's solver of mesa has 1e-5 in its denominators
        assert disagreement(ours, arm) < (1e-3 if name == "mesa" else 3e-6)
    if arm.carries:
        with torch.no_grad():
            whole, _ = arm.run(arm.tensors, None)
            first, state = arm.run(cut(arm.tensors, 0, 64), None)
            more, state = arm.run(cut(arm.tensors, 64, 128), state)
        torch.testing.assert_close(torch.cat((first, more), 1), whole, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ours.tensors, before)  # none writes into its input
