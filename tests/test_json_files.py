"""Every JSON file and output of figures is valid, whatever the numbers are."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layerzoo.support.json_files import dumps, floats, read_figures, write_json
from layerzoo.tools.bench import report as bench_report
from layerzoo.tools.bench.measure import Spread
from layerzoo.tools.bench.run import BenchRow, BenchSettings

FIGURES = {
    "a": math.nan,
    "b": [math.inf, {"c": -math.inf}],
    "d": 1.5,
    "e": 2,
    "f": None,
    "g": True,
}


def strict(text: str) -> Any:
    """What a parser reads that knows the standard alone."""
    return json.loads(text, parse_constant=pytest.fail)


def test_numbers_that_are_not_finite_are_words_that_float_reads() -> None:
    text = dumps(FIGURES)
    words = {"a": "nan", "b": ["inf", {"c": "-inf"}]}
    assert strict(text) == {**words, "d": 1.5, "e": 2, "f": None, "g": True}
    again = floats(strict(text))
    assert math.isnan(again["a"]) and again["b"] == [math.inf, {"c": -math.inf}]
    assert {name: again[name] for name in "defg"} == {n: FIGURES[n] for n in "defg"}


def test_numbers_of_other_libraries_are_numbers() -> None:
    tree = {"a": np.float32(0.5), "b": np.int64(3), "c": (np.float64("nan"), np.uint8(1))}
    assert strict(dumps(tree)) == {"a": 0.5, "b": 3, "c": ["nan", 1]}
    with pytest.raises(TypeError):  # a tensor is no number, and nothing is dropped
        dumps({"a": torch.zeros(3)})


def test_a_file_is_read_as_it_was_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, FIGURES)
    strict(path.read_text())
    assert str(read_figures(path)) == str(FIGURES) and [*tmp_path.iterdir()] == [path]
    path.write_text('{"a": NaN, "b": [Infinity, {"c": -Infinity}]}')  # of earlier versions
    assert str(read_figures(path)) == str({name: FIGURES[name] for name in "ab"})


def test_a_link_is_followed_and_a_pipe_is_written(tmp_path: Path) -> None:
    link, path, pipe = (tmp_path / name for name in ("link", "x.json", "pipe"))
    link.symlink_to(path)
    write_json(link, {"a": 1})
    assert link.is_symlink() and strict(path.read_text()) == {"a": 1}
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, {"a": 2})
    assert strict(os.read(end, 100).decode()) == {"a": 2}
    os.close(end)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_benchmark_writes_a_ratio_that_is_no_number(tmp_path: Path) -> None:
    spread = Spread(math.inf, math.nan, 1.0)
    row = BenchRow("linear", 8, "forward", "chunked", False, [], ratio=spread)
    peaks = bench_report.Peaks(math.nan, None)
    bench_report.write_json(tmp_path / "x.json", [row], BenchSettings("ops"), peaks)
    (found,) = strict((tmp_path / "x.json").read_text())["rows"]
    assert found["ratio"] == {"median": "inf", "low": "nan", "high": 1.0}
