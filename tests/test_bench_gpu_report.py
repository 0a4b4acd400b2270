"""The page of the figures of GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerzoo import SpecError
from layerzoo.cli import main
from layerzoo.tools.bench import gpu_report

MEASURES = ("forward", "forward+backward")


def row(layer: str, T: int, measure: str, impl: str, ms: float, ratio: float | None) -> Any:
    spread = {"median": ms, "low": ms, "high": ms}
    return {
        "layer": layer,
        "T": T,
        "measure": measure,
        "impl": impl,
        "yardstick": False,
        "ms": spread,
        "ratio": None if ratio is None else {**spread, "median": ratio},
        "peak": 3 * 2**20 if ratio is None else None,
        "gemm_fraction": 0.125 if ratio is None else None,
        "roof_fraction": 0.5 if ratio is None else None,
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = []
    for n, T in enumerate((1024, 4096, 16384)):
        for measure in MEASURES:
            rows.append(row("gla", T, measure, "layerzoo", 1.5 + n, None))
            rows.append(row("gla", T, measure, "fla", 3.0, 3 / (1.5 + n)))
    machine = {"gemm_gflops": 8e5, "copy_bytes_per_second": 3e12}
    about = {"machine": machine, "versions": {"torch": "2.11.0"}, "skipped": ["fla of x: no"]}
    found = [{"name": "matrix memories", **about, "rows": rows}]
    found.append({"name": "matrix memories", "failed": "kda: it broke"})
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "gpu-1.json").write_text(json.dumps({"gpu": "GPU 1", "benchmarks": found}))
    return folder


def test_the_page_gets_the_tables_and_the_picture(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{gpu_report.BEGIN}old\n{gpu_report.END}after\n")
    table = tmp_path / "table.yaml"
    table.write_text(
        "matrix memories: {names: [gla, kda], lengths: '4096,65536'}\n"
        "sliding: {names: ['{name: sliding, window: 512}'], lengths: 96}\n"
    )
    options = ["--out", str(results), "--table", str(table)]
    for _ in range(2):  # the second replaces the first
        assert main(["bench", "gpu", *options, "--report", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert (
        text.count("| gla | forward | 1.50 (fla 2.00) | 2.50 (fla 1.20) | 3.50 (fla 0.86) |") == 1
    )
    assert "| 50 | 12 | 3 |" in text and "800 TFLOP/s, copy 3.00 TB/s" in text
    assert "- fla of x: no" in text and "- kda: it broke" in text
    assert "- matrix memories: gla (64k), kda\n- sliding: sliding(window=512)\n" in text
    assert "![times against peers](results/gpu-1.svg)" in text
    assert (results / "gpu-1.svg").read_text().count("forward+backward") == 1


def test_what_is_missing_is_said(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("no place\n")
    with pytest.raises(SpecError, match="has no place for the figures"):
        gpu_report.write(results, page, {})
    with pytest.raises(SpecError, match="no figures; run `layerzoo bench gpu`"):
        gpu_report.write(tmp_path / "none", page, {})
    assert page.read_text() == "no place\n"
