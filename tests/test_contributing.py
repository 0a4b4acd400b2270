"""The worked example of CONTRIBUTING.md is installed as a package, proved, and trained."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which the example's distribution is installed."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(r"<!-- example -->\n```python\n(.*?)```\n<!-- /example -->", text, re.S)
    assert found is not None
    code = found[1]
    assert len(code.splitlines()) < 60
    (tmp_path / "example_package.py").write_text(code)
    info = tmp_path / "example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    entry = "[layerzoo.layers]\nmoving_average = example_package\n"
    (info / "entry_points.txt").write_text(entry)
    return {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "2"}


def call(env: dict[str, str], *argv: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, *argv], env=env, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_is_found_proved_and_trained(
    installed: dict[str, str], tmp_path: Path
) -> None:
    assert "s_t = a s_{t-1}" in call(installed, "-m", "layerzoo", "list", "moving_average")

    suite = str(ROOT / "tests" / "test_conformance.py")
    out = call(installed, "-m", "pytest", suite, "-k", "moving_average", "-p", "no:cacheprovider")
    passed = re.search(r"(\d+) passed", out)
    assert passed is not None and int(passed[1]) >= 20, out

    options = "--trainer.max_steps 60 --trainer.val_check_interval 30 --trainer.callbacks null"
    size = "--data.length 32 --data.val_samples 32 --model.network.dim 32"
    layers = "[{name: moving_average, half_life: 4}]"
    train = ("fit", "--config", "text", "--model.network.layers", layers)
    out = call(installed, "-m", "layerzoo", *train, *options.split(), *size.split(), cwd=tmp_path)
    before, after = re.search(r"loss/held_out: ([\d.]+) at .*, ([\d.]+) at", out).groups()  # type: ignore[union-attr]
    assert float(after) < float(before)
