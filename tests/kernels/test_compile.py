"""The kernels, compiled for GPUs that are not here: `layerzoo bench compile`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from layerzoo.kernels.launch import TARGETS

ALL = "sm_80,sm_90,gfx942"
SPILLED = {
    ("mlp_backward", "sm_80"): 240,
    ("mlp_backward", "sm_90"): 40,
    ("mlp_forward", "sm_80"): 208,
    ("mlp_forward", "sm_90"): 80,
    ("scan", "sm_80"): 104,
    ("scan", "sm_90"): 88,
    ("strong_backward", "sm_90"): 8,
    ("strong_forward", "sm_80"): 8,
}
"""Bytes of a thread that a kernel may spill, by its name and target; all others none."""
SCALAR = ("step", "kernel")
"""How the names of kernels without matrix products end."""


def compiled(tmp_path: Path, targets: str, *more: str) -> list[dict[str, Any]]:
    """In a process of its own: the interpreter that runs here compiles nothing."""
    path = tmp_path / "kernels.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "layerzoo", "bench", "compile", "--json", str(path)]
    run = [*command, "--targets", targets, *more]
    subprocess.run(run, env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())


def check(
    rows: list[dict[str, Any]], targets: str, spilled: dict[tuple[str, str], int] | None
) -> None:
    assert {row["target"] for row in rows} == {*targets.split(",")}
    for row in rows:
        where = f"{row['name']} of {row['of']} on {row['target']}"
        assert row["shared"] <= TARGETS[row["target"]].shared, where
        if spilled is not None:
            assert row["spilled"] <= spilled.get((row["name"], row["target"]), 0), where
        assert bool(row["tensor_cores"]) != row["name"].endswith(SCALAR), where


@pytest.mark.parametrize("targets", ["sm_90", pytest.param(ALL, marks=pytest.mark.slow)])
def test_64_channels_in_bfloat16(tmp_path: Path, targets: str) -> None:
    one = ("--jobs", "1") if targets == "sm_90" else ()  # another process starts as long
    check(compiled(tmp_path, targets, *one), targets, SPILLED)


@pytest.mark.slow
def test_other_channels_and_types(tmp_path: Path) -> None:
    rows = compiled(tmp_path, ALL, "--dtypes", "bfloat16", "--head-dims", "128")
    check(rows, ALL, None)
