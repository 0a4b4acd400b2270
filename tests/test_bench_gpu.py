"""Benchmarks of a GPU, as far as a machine without one can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from layerzoo import SpecError, build
from layerzoo.cli import main
from layerzoo.tools.bench import gpu
from layerzoo.tools.bench.calls import arm_of, call_of
from layerzoo.tools.bench.command import arguments, specs_of
from layerzoo.tools.bench.measure import Spread
from layerzoo.tools.bench.peers import choose_peers, peers_of
from layerzoo.tools.bench.report import Peaks
from layerzoo.tools.bench.run import BenchRow, BenchSettings, bytes_of

TABLE = yaml.safe_load(gpu.TABLE.read_text())


@pytest.mark.parametrize("title", TABLE)
def test_the_table_names_what_there_is(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options parse, its layers build with the channels that the title says, its peers fit."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    options = arguments(gpu.options_of(TABLE[title]))
    names = [spec["name"] for spec in specs_of(options).values()]
    assert f"D = {options.dim // options.heads}" in title and options.impl == "triton"
    for name in names:
        fits = {peer.name for peer in peers_of("ops", name, "cuda")}
        assert set(options.against.split(",")) <= fits


def test_peers_are_told_apart_by_device() -> None:
    cpu, cuda = ({p.name: p for p in peers_of("ops", "gla", d)} for d in ("cpu", "cuda"))
    assert "fla" not in cpu and cuda["fla"].device == "cuda"
    (naive,) = (p for p in peers_of("ops", "kda", "cpu") if p.name == "fla")
    assert naive.device == "cpu"
    with pytest.raises(SpecError, match="--against flex_attention: runs on cuda alone; see --dev"):
        choose_peers("flex_attention", "ops", ["sliding"], "cpu")


def test_our_portable_path_as_a_peer() -> None:
    layer, x = build("linear", dim=16, heads=2), torch.randn(1, 20, 16)
    layer.impl = "recurrent"
    (peer,) = (p for p in peers_of("ops", "linear", "cuda") if p.name == "chunked")
    ours = arm_of(layer, x, "ops")
    assert ours is not None
    before = set(layer.op.used)
    layer.op.used.clear()
    arm = peer.build(layer, ours.tensors)
    arm.run(arm.tensors, None)
    assert layer.op.used == {"chunked"} and layer.impl == "recurrent"
    layer.op.used.update(before)


def test_a_batch_of_so_many_tokens() -> None:
    settings = BenchSettings("ops", tokens=4096)
    assert [settings.at(T).batch for T in (1024, 4096, 8192)] == [4, 1, 1]
    assert BenchSettings("ops", batch=3).at(1024).batch == 3


def test_the_bytes_that_an_op_moves() -> None:
    """Of q, k, v and o of 2 x 10 x 2 x 8 float32 each; states of 2 x 2 x 8 x 8."""
    one, state = 4 * 2 * 10 * 16, 4 * 2 * 2 * 8 * 8
    layer = build("linear", dim=16, heads=2)
    arm = arm_of(layer, torch.randn(2, 10, 16), "ops")
    assert arm is not None
    assert bytes_of(layer, arm, "forward") == 4 * one
    assert bytes_of(layer, arm, "backward") == 3 * 3 * one + 2 * one
    assert bytes_of(layer, arm, "decode") == 2 * state
    assert bytes_of(layer, arm, "prefill") is None
    attention = build({"name": "sliding", "window": 4, "heads": 2}, dim=16)
    arm = arm_of(attention, torch.randn(2, 10, 16), "ops")
    assert arm is not None
    assert bytes_of(attention, arm, "decode") == 2 * 4 * 2 * 3 * 16  # window - 1 keys and values
    fast = build({"name": "ttt_linear", "mini_batch": 4, "heads": 2}, dim=16)
    arm = arm_of(fast, torch.randn(2, 10, 16), "ops")
    assert arm is not None
    weights = 4 * 2 * 2 * 9 * 8  # with a bias; only the updates are written
    assert bytes_of(fast, arm, "decode") == 3 * weights


def test_the_share_of_the_roof() -> None:
    def row(ms: float, flops: float, moved: int | None) -> BenchRow:
        more: Any = {"ms": Spread(ms, ms, ms), "gflops": flops / ms / 1e6, "moved": moved}
        return BenchRow("linear", 1, "forward", "layerzoo", False, [ms], **more)

    peaks = Peaks(gemm=1000.0, copy=1e9)
    assert peaks.roof(row(2.0, 1e6, 10**6)) == pytest.approx(0.5)  # 1 ms of bytes
    assert peaks.roof(row(2.0, 1e9, 10**6)) == pytest.approx(0.5)  # 1 ms of FLOPs
    assert peaks.roof(row(4.0, 1e9, 3 * 10**6)) == pytest.approx(0.75)
    assert peaks.roof(row(1.0, 1e6, None)) is None
    assert Peaks(1000.0, None).roof(row(1.0, 1e6, 1)) is None


def test_a_measure_in_which_a_peer_failed_is_left_out() -> None:
    layer = build("linear", dim=16, heads=2)
    arm = arm_of(layer, torch.randn(2, 10, 16), "ops")
    assert arm is not None
    without = type(arm)(arm.run, arm.tensors, without=("backward",))
    assert call_of(without, "backward") is None and call_of(without, "forward")


def test_no_gpu_is_said(capsys: Any, tmp_path: Path) -> None:
    assert main(["bench", "gpu", "--out", str(tmp_path / "out")]) == 2
    assert "there is no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["bench", "gpu", "--only", "slidng"]) == 2
    assert "--only slidng: no such benchmark" in capsys.readouterr().err
