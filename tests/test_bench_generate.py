"""`layerzoo bench generate`: memory and time per token of one long generation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from layerzoo.cli import main
from layerzoo.tools.bench import stream
from layerzoo.tools.bench.stream import MIB, Point, Stream, growth, label_of, measure, table

BOUNDED = "{name: parallel, children: [{name: sliding, window: 8}, {name: allmem, mini_batch: 4}]}"


APART = stream.in_a_process


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "in_a_process", lambda run, *args: run(*args))


def arm(spec: Any, **fields: Any) -> Stream:
    sizes = {"dim": 16, "depth": 1, "tokens": 50, "every": 20, "threads": 1}
    return Stream(spec, **{**sizes, **fields})


def test_points() -> None:
    found = measure(arm("softmax"))
    assert [p.tokens for p in found] == [20, 40, 50]
    assert [p.state - found[0].state for p in found] == [0, *(4 * 2 * 16 * n for n in (20, 30))]
    assert all(p.ms > 0 < p.cpu_ms and 50 * MIB < p.rss < 10000 * MIB for p in found)


def test_what_is_said_of_a_run() -> None:
    found = [
        Point(100 * n, (10 + (n > 15)) * MIB, 1024 * n, 9.0, 1.0 + (n > 16)) for n in range(1, 21)
    ]
    lines = table("name", found).splitlines()
    assert len(lines) == 12 and lines[0] == "name"
    assert lines[-1].split() == ["2,000", "11.0", "20.0", "9.00", "2.00"]
    assert growth(found) == (
        "from 200 to 2,000 tokens: RSS 10.0 -> 11.0 MiB, largest / smallest 1.1000; "
        "CPU ms/token 1.00 -> 2.00 (medians of the first and last fifth)"
    )
    assert label_of({"name": "parallel", "children": ["a", {"name": "b", "c": 1}]}) == "a+b"


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_end_to_end(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    apart: bool,
) -> None:
    """Also where each measure is made in a process of its own."""
    if apart:
        monkeypatch.setattr(stream, "in_a_process", APART)
        assert APART(os.getpid) != os.getpid()
    files = ("--json", str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png"))
    sizes = ("--tokens", "60,40", "--every", "20", "--dim", "16", "--depth", "1")
    assert main(["bench", "generate", BOUNDED, "softmax", *sizes, *files]) == 0
    out = capsys.readouterr().out
    runs = json.loads((tmp_path / "x.json").read_text())["runs"]
    assert list(runs) == ["sliding+allmem", "softmax"] and all(name in out for name in runs)
    assert list(runs["softmax"][0]) == [*Point._fields]
    states = {name: [p["state"] for p in found] for name, found in runs.items()}
    assert len(set(states["sliding+allmem"])) == 1 and len(set(states["softmax"])) == 2
    assert (tmp_path / "x.png").stat().st_size > 10000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["softmaxx"], "unknown layer 'softmaxx'; did you mean 'softmax'?"),
        (["{name: [}"], "NAME {name: [}: not YAML"),
        (["softmax", "--tokens", "0"], "--tokens: expected a positive integer, got '0'"),
        (["softmax", "--tokenz", "3"], "--tokenz: no such option; did you mean '--tokens'?"),
        (["softmax", "--plot", "/no/x.png"], "--plot /no/x.png: cannot be written: No such file"),
        (
            ["softmax", "--dim", "6"],
            "layers[0]: softmax: heads (or give key_dim and value_dim): 4 does",
        ),
        (["softmax", "--tokens", "3,3"], "--tokens: 2 numbers for 1 arms"),
        ([], "bench generate: give at least one SPEC"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert main(["bench", "generate", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
