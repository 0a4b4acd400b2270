"""Benchmarks: pairing, statistics, peak memory, FLOPs, what is timed, and the command."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerzoo import build, get_layer, list_layers
from layerzoo.attention.common import Attention
from layerzoo.cli import main
from layerzoo.memory import Memory
from layerzoo.tools.bench import calls, measure
from layerzoo.tools.bench.calls import STEPS, call_of, cut
from layerzoo.tools.bench.command import prepared
from layerzoo.tools.bench.measure import Spread, alternate, difference, peak_bytes, ratios, spread
from layerzoo.tools.bench.peers import Contender
from layerzoo.tools.bench.report import digits
from layerzoo.tools.bench.run import BenchSettings, flops_of

CPU = torch.device("cpu")
TINY = ("--dim", "16", "--heads", "2", "--repeats", "2", "--lengths", "8,16")


@pytest.fixture(autouse=True)
def _small_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "GEMM", 32)


def bench(*argv: str) -> int:
    return main(["bench", *argv])


# Measuring


def test_calls_alternate_after_an_untimed_warm_up() -> None:
    log: list[str] = []

    def timed(call: Any) -> float:
        log.append("timed")
        call()
        return len(log)

    a, b = (lambda: log.append("a")), (lambda: log.append("b"))
    times = alternate([a, b], 3, timed)
    assert log == ["a", "b"] * measure.WARMUP + ["timed", "a", "timed", "b"] * 3
    assert times == [[n + 4 * i for i in range(3)] for n in (6, 8)]


def test_statistics() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
    # Of the pairs, not of the medians: 2/1, 2/4, 30/3.
    assert ratios([1.0, 4.0, 3.0], [2.0, 2.0, 30.0]) == Spread(2.0, 1.25, 6.0)


def test_peak_memory_is_exact() -> None:
    before = torch.ones(1000)

    def call() -> Tensor:
        a = torch.empty(1000)  # 4000
        b = torch.empty(2000)  # 12000, the peak
        del a
        c = torch.empty(500)  # 10000
        del b
        return c + before[:500]

    assert peak_bytes(call, CPU) == 12000
    assert peak_bytes(call, CPU) == 12000
    assert peak_bytes(lambda: before.neg_(), CPU) == 0
    assert peak_bytes(lambda: before + before, CPU) == 4000


def test_peak_memory_of_a_layer_is_that_of_its_tensors() -> None:
    """A product saves nothing without gradients; with them, grad of x and of the weight."""
    layer, x = nn.Linear(8, 4, bias=False), torch.randn(5, 8)
    arm = Contender(lambda x, state: (layer(x["x"]), None), {"x": x}, tuple(layer.parameters()))
    forward, backward = (call_of(arm, name) for name in ("forward", "backward"))
    assert forward and backward
    out, grads = 5 * 4 * 4, 5 * 8 * 4 + 8 * 4 * 4
    assert peak_bytes(forward, CPU) == out
    assert peak_bytes(backward, CPU) == out + grads


def test_difference() -> None:
    want = torch.tensor([0.0, -4.0, 2.0])
    assert difference(want.clone(), want) == 0
    assert difference(want + torch.tensor([0.0, 0.0, 1.0]), want) == 0.25
    assert difference(want[:2], want) == math.inf
    assert difference(want * math.nan, want) == math.inf


def test_flops() -> None:
    ops = BenchSettings("ops", batch=3)
    layers = replace(ops, mode="layers")
    layer = build("linear", dim=16, heads=2)
    rule, projections = 2 * 4 * 8 * 8, 4 * 2 * 16 * 16
    assert flops_of(layer, ops, "forward", 10) == rule * 30
    assert flops_of(layer, ops, "prefill", 10) == rule * 30
    assert flops_of(layer, ops, "backward", 10) == 3 * rule * 30
    assert flops_of(layer, layers, "forward", 10) == (rule + projections) * 30
    assert flops_of(layer, ops, "decode", 10) is None
    assert measure.gflops(3e9, 1500.0) == 2.0


# What is timed


@pytest.mark.parametrize("name", list_layers())
def test_inner_is_the_layer_between_its_projections(name: str) -> None:
    cls = get_layer(name)
    layer, x = build(name, dim=16, **cls.cases[0]), torch.randn(2, 12, 16)
    with torch.no_grad():
        want, want_state = layer(x)
        inner = layer.inner(x)
        if cls.kind == "composition":
            assert inner is None
            return
        assert inner is not None
        assert {(*t.shape[:2],) for t in inner.tensors.values()} == {(2, 12)}
        first, state = inner.fn(cut(inner.tensors, 0, 5), None)
        more, state = inner.fn(cut(inner.tensors, 5, 12), state)
        whole, _ = inner.fn(inner.tensors, None)
        torch.testing.assert_close(torch.cat((first, more), 1), whole)
        torch.testing.assert_close(state, want_state)
        if isinstance(layer, Memory):
            assert torch.equal(layer.merge(whole, x), want)
        elif isinstance(layer, Attention):
            assert torch.equal(layer.merge(whole, x), want)
            _, state = layer(x[:, :5])  # its positions go on from a state
            later = layer.inner(x[:, 5:], state)
            torch.testing.assert_close(later.tensors, cut(inner.tensors, 5, 12))


def test_measures_of_an_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "PIECE", 4)
    seen: list[tuple[int, Any]] = []

    def fn(x: dict[str, Tensor], state: Any) -> tuple[Tensor, Any]:
        seen.append((x["x"].shape[1], state))
        return 2 * x["x"], x["x"].shape[1] + (state or 0)

    def done(name: str, arm: Contender) -> list[tuple[int, Any]] | None:
        call = call_of(arm, name)
        seen.clear()
        if call is None:
            return None
        call()
        return seen

    arm = Contender(fn, {"x": torch.randn(1, 10, 3)}, step=fn, carries=True)
    assert done("forward", arm) == done("backward", arm) == [(10, None)]
    assert done("prefill", arm) == [(4, None), (4, 4), (2, 8)]
    assert done("decode", arm) == [(1, 10 + n) for n in range(STEPS)]
    whole = replace(arm, carries=False)  # it returns a state, and takes none but in steps
    assert done("prefill", whole) is None
    assert done("decode", whole) == [(1, 10 + n) for n in range(STEPS)]
    monkeypatch.setattr(calls, "PIECE", 16)
    assert done("prefill", whole) == [(10, None)]
    stateless = replace(whole, step=None)
    assert done("prefill", stateless) is None and done("decode", stateless) is None


def test_forward_needs_no_gradient_and_backward_gives_all() -> None:
    got = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            return x * w

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
            got.append(ctx.needs_input_grad)
            return grad, grad.sum()

    w = nn.Parameter(torch.ones(()))

    def fn(x: dict[str, Tensor], state: Any) -> tuple[Tensor, None]:
        return Probe.apply(x["x"], w), None

    arm = Contender(fn, {"x": torch.randn(1, 4)}, (w,))
    forward, backward = call_of(arm, "forward"), call_of(arm, "backward")
    assert forward and backward
    assert not forward()[0].requires_grad and not got
    backward()
    assert got == [(True, True)] and w.grad is None


# The command


@pytest.mark.parametrize("mode", ["ops", "layers"])
def test_end_to_end(mode: str, capsys: Any, tmp_path: Path) -> None:
    file, picture = tmp_path / "rows.json", tmp_path / "picture.png"
    wanted = ("gated_delta", "{name: linear, decay: scalar}", "softmax")
    more = ("--json", str(file), "--plot", str(picture), "--against", "none", "--threads", "1")
    assert bench(mode, *wanted, *TINY, "--batch", "3", *more) == 0
    out = capsys.readouterr().out
    for word in (torch.__version__, "1 thread", "float32", "GEMM peak", "B 3, T 8 16, D 16"):
        assert word in out
    assert picture.read_bytes().startswith(b"\x89PNG")

    content = json.loads(file.read_text())
    rows, peak = content["rows"], content["machine"]["gemm_gflops"]
    assert content["versions"]["torch"] == torch.__version__
    assert content["settings"]["lengths"] == [8, 16] and content["settings"]["mode"] == mode
    assert content["settings"]["dtype"] == "float32" and peak > 0
    names = ("gated_delta", "linear(decay=scalar)", "softmax")
    measures = ("forward", "forward+backward", "prefill", "decode")
    assert [(r["layer"], r["T"], r["measure"]) for r in rows] == [
        (name, T, m) for name in names for T in (8, 16) for m in measures
    ]
    table = out[out.index("\nlayer ") + 1 :].splitlines()
    assert len(table) == 1 + len(rows)
    for line, row in zip(table[1:], rows, strict=True):
        assert line.startswith(row["layer"]) and f" {row['measure']} " in line
        assert len(row["times"]) == 2 and row["ran"] == ["chunked"]
        tokens = 3 * (1 if row["measure"] == "decode" else row["T"])
        assert row["us_per_token"] == pytest.approx(1e3 * row["ms"]["median"] / tokens)
        assert (row["peak"] is None) == (row["measure"] in ("prefill", "decode"))
        assert (row["gflops"] is None) == (row["measure"] == "decode")
        share = row["gflops"] and pytest.approx(row["gflops"] / peak)
        assert row["gemm_fraction"] == share
    assert re.search(r"GEMM peak ([\d.]+) GFLOP/s", out)[1] == digits(peak)  # type: ignore[index]
    linear = next(r for r in rows if r["layer"] == names[1])
    per_token = 2 * 4 * 8 * 8 + (0 if mode == "ops" else 4 * 2 * 16 * 16 + 2 * 16 * 2)
    assert linear["gflops"] * linear["ms"]["median"] * 1e6 == pytest.approx(3 * 8 * per_token)


def test_all_layers_and_a_named_impl(capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    more = ("--measure", "forward,forward", "--lengths", "8", "--impl", "recurrent")
    assert bench("ops", *TINY, "--against", "none", *more, "--json", str(file)) == 0
    rows = json.loads(file.read_text())["rows"]
    found = dict.fromkeys(r["layer"] for r in rows)
    assert list(found) == [name for name in list_layers() if get_layer(name).kind != "composition"]
    assert {(r["measure"], *r["ran"]) for r in rows} == {("forward", "recurrent")}


@pytest.mark.parametrize("crowded", [False, True])
def test_the_picture(crowded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerzoo.tools.bench import plot

    figures: list[Any] = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    if crowded:
        monkeypatch.setattr(plot, "CROWD", 1)
    more = ("--plot", str(tmp_path / "picture.svg"), "--measure", "forward,decode")
    assert bench("ops", "linear", "softmax", *TINY, "--against", "sdpa", *more) == 0
    (figure,) = figures
    ours, sdpa = ["layerzoo"], ["sdpa", "sdpa (yardstick)"]
    titles = [axes.get_title() for axes in figure.axes]
    legend = sorted(text.get_text() for text in figure.legends[0].texts)
    if crowded:  # a row of panels a layer
        assert titles == [
            f"{a}: {b}" for a in ("linear", "softmax") for b in ("forward", "decode")
        ]
        assert legend == ours + sdpa
    else:
        assert titles == ["forward", "decode"]
        assert legend == ["linear", "linear, sdpa (yardstick)", "softmax", "softmax, sdpa"]
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert len(axes.lines) == (2 if crowded else 4)
        assert all(list(line.get_xdata()) == [8, 16] for line in axes.lines)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "bench: expected ops or layers"),
        (["opss"], "unknown benchmark 'opss'; did you mean 'ops'?"),
        (["ops", "linaer"], "unknown layer 'linaer'; did you mean 'linear'?"),
        (["ops", "{name: linear"], "NAME {name: linear: not YAML; write '{name: linear, heads"),
        (
            ["ops", "{name: linear, head: 2}"],
            "linear: unknown field 'head'; did you mean 'heads'?",
        ),
        (
            ["ops", "{name: parallel, children: [linear]}"],
            "has no rule to time alone; use",
        ),
        (["layers", "parallel"], "parallel: children: missing"),
        (["ops", "--against", "spda"], "--against spda: unknown peer; did you mean 'sdpa'?"),
        (["layers", "--against", "sdpa"], "--against sdpa: fits none of layers: "),
        (
            ["ops", "--measure", "forward,bakward"],
            "--measure: unknown measure 'bakward'; did you",
        ),
        (["ops", "--lengths", "8,0"], "--lengths: expected positive integers such as 1024,2048"),
        (["ops", "--lengths", "8,x"], "--lengths: expected positive integers such as 1024,2048"),
        (["ops", "--batch", "-1"], "--batch: expected a positive integer, got '-1'"),
        (["ops", "--repeats", "0"], "--repeats: expected a positive integer, got '0'"),
        (["ops", "--dtype", "float23"], "--dtype: unknown dtype 'float23'; did you mean"),
        (["ops", "--device", "cuda:99"], "--device: 'cuda:99' is not available here; use cpu"),
        (["ops", "--device", "gpu"], "--device: unknown device 'gpu'; known: cpu, cuda"),
        (["ops", "--lenghts", "8"], "--lenghts: no such option; did you mean '--lengths'?"),
        (
            ["ops", "--dim", "10", "linear"],
            "linear: heads (or give key_dim and value_dim): 4",
        ),
        (["ops", "linear", "--impl", "fast"], "impl 'fast' is unknown"),
        (["ops", "mesa", "--impl", "triton", *TINY], "impl 'triton' cannot run"),
        (
            ["ops", "--json", "/no/where.json"],
            "--json /no/where.json: cannot be written: No such file",
        ),
        (["ops", "--json", "/"], "--json /: cannot be written: Is a directory"),
        (
            ["ops", "--plot", "/no/where.png"],
            "--plot /no/where.png: cannot be written: No such file",
        ),
        (["ops", "--plot", "/tmp/a.txt"], "--plot /tmp/a.txt: cannot draw this kind; use .png"),
    ],
)
def test_bad_input(capsys: Any, argv: list[str], message: str) -> None:
    quick = ["linear", *TINY] if len(argv) == 3 and not argv[1].startswith("{") else []
    assert bench(*argv[:1], *quick, *argv[1:]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("layerzoo: error: ") and message in line


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with prepared(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with prepared(None):
        assert torch.get_num_threads() == before


def test_files_are_checked_before_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refused or interrupted benchmark leaves no empty file, and an old one as it was."""
    new, old = tmp_path / "new.json", tmp_path / "old.png"
    old.write_text("old")

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("layerzoo.tools.bench.command.bench", interrupted)
    assert bench("ops", "linear", *TINY, "--json", str(new), "--plot", str(old)) == 130
    assert capsys.readouterr().err == "layerzoo: interrupted\n"
    assert not new.exists() and old.read_text() == "old"
