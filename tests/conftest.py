"""What all tests share: fixed threads and seeds, and a registry that forgets test layers."""

from __future__ import annotations

import gc
import getpass
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # torch.compile's cache does not tell code for one set of instructions from that for another.
    folder = Path(tempfile.gettempdir(), f"torchinductor-{getpass.getuser()}-{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
if not torch.cuda.is_available():  # kernels run in Triton's interpreter; before it is imported
    os.environ["TRITON_INTERPRET"] = "1"

from layerzoo import SpecError, layer, list_layers


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end, so that no look for garbage need go
    through it; and looks are rarer. Together they were a tenth of the time of all tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    # Tensors are tiny, and two threads crawl when a core is busy.
    torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def registry() -> Iterator[dict[str, type[layer.Layer]]]:
    """The registry, put back as it was after the test."""
    list_layers()  # discover first, else the snapshot would drop real layers
    before = dict(layer.REGISTERED)
    yield layer.REGISTERED
    layer.REGISTERED.clear()
    layer.REGISTERED.update(before)


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[str], AbstractContextManager[None]]:
    """Of what is done inside with the grid file in tmp_path: it is refused in one line, with the
    message, at the file's line that is marked <-, if there is one."""

    @contextmanager
    def check(message: str) -> Iterator[None]:
        with pytest.raises(SpecError) as error:
            yield
        path = tmp_path / "grid.yaml"
        lines = [n for n, line in enumerate(path.read_text().splitlines(), 1) if "<-" in line]
        where = f"grid {path}:{lines[0]}: " if lines else f"grid {path}: "
        assert str(error.value).startswith(where)
        assert message in str(error.value) and "\n" not in str(error.value)

    return check


Measured = Mapping[str, float] | str | None
"""Of a cell: its figures; {} if it diverged, the reason if it failed, None if it has not run."""
SIZES = {"steps": 500, "parameters": 1000, "state_bytes": 64, "length": 48}


@pytest.fixture
def write_results(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of results as `layerzoo ablate run` leaves it, without training."""
    # Imported here, as pytest-xdist's own process needs no Lightning and would wait for it.
    from layerzoo.ablations.cells.arms import arm_name, read_arms
    from layerzoo.ablations.cells.axes import read_axes
    from layerzoo.ablations.cells.source import Source

    def write(
        measured: Callable[[dict[str, str], int], Measured],
        about: Callable[[str], dict[str, Any]] = lambda arm: {},
        data: Mapping[str, Any] | None = None,
        models: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Path:
        """measured: by an arm's options and a seed. about: what cell.json has of an arm beside.
        models: by arm, the section of config.yaml; there is none without."""
        root = tmp_path / "grid"
        root.mkdir()
        tree = {"name": "grid", "base": "mqar", "seeds": [0, 1, 2], **fields}
        file = root / "grid.yaml"
        file.write_text(f"# Does it remember?\n{yaml.safe_dump(tree, sort_keys=False)}")
        source = Source(file)
        arms = read_arms(source, read_axes(source, "axes"), tree.get("design", "product"))
        cells = []
        for seed in tree["seeds"]:
            for arm in arms:
                cell = {"path": f"{arm_name(arm)}/seed-{seed}", "arm": arm_name(arm)}
                cell |= {"options": arm, "seed": {"init": seed, "data": seed}, "split": "test"}
                cell |= {"tuned": {}, "matched": {}, **about(arm_name(arm))}
                cells.append(cell)
                section = {"model": models[arm_name(arm)]} if models else {}
                _write_cell(root / cell["path"], measured(arm, seed), data or {}, section)
        (root / "cells.json").write_text(json.dumps(cells))
        return root

    return write


def _write_cell(
    folder: Path, measured: Measured, data: Mapping[str, Any], model: Mapping[str, Any]
) -> None:
    if measured is None:
        return
    folder.mkdir(parents=True)
    task = {"class_path": "layerzoo.data.MQAR", "init_args": {**data}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": task, **model}))
    if isinstance(measured, str):
        (folder / "failed.json").write_text(json.dumps({"reason": measured}))
    elif not measured:
        (folder / "diverged.json").write_text(json.dumps({"reason": "loss nan at step 7"}))
    else:
        (folder / "metrics.json").write_text(json.dumps({**SIZES, **measured}))
        record = {"versions": {"layerzoo": "0.1.0", "torch": "2.13.0", "commit": "a" * 40}}
        record |= {"device": "cpu", "seconds": 60.0}
        (folder / "record.json").write_text(json.dumps(record))
