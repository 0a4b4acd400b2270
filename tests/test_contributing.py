"""The examples of CONTRIBUTING.md are installed as a package, checked, trained and swept."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerzoo import layer
from layerzoo.cli import main

from .here import quick

ROOT = Path(__file__).parents[1]
GRID = """# Which of the examples remembers?
name: mine
base: mqar
budget: 4
set: {model.network.dim: 16, data.init_args.batch_size: 4, data.init_args.val_samples: 8,
  data.init_args.test_samples: 8}
axes:
  layer:
    moving_average: {model.network.layers: [moving_average]}
    fading: {model.network.layers: [{name: fading, heads: 2}]}
    alibi: {model.network.layers: [{name: alibi, heads: 2}]}
seeds: [0]
"""


@pytest.fixture
def installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: dict[str, type[layer.Layer]]
) -> Iterator[None]:
    """A distribution with both examples is installed, here and for new processes, and no layer
    has been looked for."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    entries, modules = "[layerzoo.layers]\n", list[str]()
    site = tmp_path / "site"
    info = site / "example-1.0.dist-info"
    info.mkdir(parents=True)
    for mark, lines in (("example", 60), ("memory", 80), ("attention", 60)):
        found = re.search(rf"<!-- {mark} -->\n```python\n(.*?)```\n<!-- /{mark} -->", text, re.S)
        assert found is not None and len(found[1].splitlines()) < lines
        modules.append(f"{mark}_package")
        (site / f"{modules[-1]}.py").write_text(found[1])
        entries += f"{mark} = {modules[-1]}\n"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    monkeypatch.setattr("layerzoo.registry._discovered", False)
    monkeypatch.chdir(tmp_path)
    yield
    for name in modules:
        sys.modules.pop(name, None)


def test_the_examples_are_found_checked_trained_and_swept(
    installed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sweep's worker is a process of its own, which finds them as any new one does."""

    def call(*argv: str) -> str:
        assert main(argv) == 0
        return capsys.readouterr().out

    assert "s_t = a s_{t-1}" in call("list", "moving_average")

    out = call("check", "moving_average", "fading", "alibi", "--quick")
    assert "pieces          holds in 6 " in out and " checks hold (" in out

    options = "--trainer.max_steps 40 --trainer.val_check_interval 20 --trainer.callbacks null"
    size = "--data.length 32 --data.val_samples 32 --model.network.dim 32"
    layers = "[{name: moving_average, half_life: 4}, {name: fading, heads: 2}]"
    train = ("fit", "--config", "text", "--model.network.layers", layers)
    with quick():
        out = call(*train, *options.split(), *size.split())
    before, after = re.search(r"loss/held_out: ([\d.]+) at .*, ([\d.]+) at", out).groups()  # type: ignore[union-attr]
    assert float(after) < float(before)

    grid = tmp_path / "grid.yaml"
    grid.write_text(GRID)
    with quick():
        out = call("ablate", "run", str(grid), "--jobs", "1")
    assert all(name in out for name in ("moving_average", "fading", "alibi"))
    assert len([*tmp_path.glob("runs/ablations/mine/*/*/metrics.json")]) == 3
