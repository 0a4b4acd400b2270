"""The examples of CONTRIBUTING.md are installed as a package, checked, trained and swept."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GRID = """# Which of the examples remembers?
name: mine
base: mqar
budget: 4
set: {model.network.dim: 16, data.init_args.batch_size: 4, data.init_args.val_samples: 8}
axes:
  layer:
    moving_average: {model.network.layers: [moving_average]}
    fading: {model.network.layers: [{name: fading, heads: 2}]}
seeds: [0]
"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which a distribution with both examples is installed."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    entries = "[layerzoo.layers]\n"
    for mark, lines in (("example", 60), ("memory", 80)):
        found = re.search(rf"<!-- {mark} -->\n```python\n(.*?)```\n<!-- /{mark} -->", text, re.S)
        assert found is not None and len(found[1].splitlines()) < lines
        (tmp_path / f"{mark}_package.py").write_text(found[1])
        entries += f"{mark} = {mark}_package\n"
    info = tmp_path / "example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)
    return {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "2"}


def call(env: dict[str, str], *argv: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, *argv], env=env, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_examples_are_found_checked_trained_and_swept(
    installed: dict[str, str], tmp_path: Path
) -> None:
    assert "s_t = a s_{t-1}" in call(installed, "-m", "layerzoo", "list", "moving_average")

    out = call(installed, "-m", "layerzoo", "check", "moving_average", "fading", "--quick")
    assert "pieces          holds in 4 " in out and " checks hold (" in out

    options = "--trainer.max_steps 60 --trainer.val_check_interval 30 --trainer.callbacks null"
    size = "--data.length 32 --data.val_samples 32 --model.network.dim 32"
    layers = "[{name: moving_average, half_life: 4}, {name: fading, heads: 2}]"
    train = ("fit", "--config", "text", "--model.network.layers", layers)
    out = call(installed, "-m", "layerzoo", *train, *options.split(), *size.split(), cwd=tmp_path)
    before, after = re.search(r"loss/held_out: ([\d.]+) at .*, ([\d.]+) at", out).groups()  # type: ignore[union-attr]
    assert float(after) < float(before)

    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID)
    out = call(installed, "-m", "layerzoo", "ablate", "run", str(grid), cwd=tmp_path)
    assert "moving_average" in out and "fading" in out
    assert len([*tmp_path.glob("runs/ablations/mine/*/*/metrics.json")]) == 2
