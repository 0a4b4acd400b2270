"""Runners and workers killed at random: a grid comes to the results of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from .extras import need

STEPS = 120


def grid_file(folder: Path, seeds: int) -> Path:
    """Two arms, one of which draws random numbers while it trains, on batches of a loader's
    process."""
    window, memory = {"name": "sliding", "heads": 2, "window": 8}, {"name": "linear", "heads": 2}
    both = {"name": "parallel", "children": [window, memory], "drop": 0.3}
    layers, workers = "model.network.layers", "data.init_args.num_workers"
    tree = {
        "name": "faults",
        "base": "mqar",
        "set": {
            "trainer.max_steps": STEPS,
            "trainer.val_check_interval": 25,
            "trainer.log_every_n_steps": 1,
            "data.init_args.train_samples": 320,
            "data.init_args.val_samples": 16,
            "data.init_args.test_samples": 16,
            "data.init_args.batch_size": 8,
            "model.network.dim": 16,
        },
        "axes": {"layer": {"memory": {layers: [memory]}, "both": {layers: [both], workers: 1}}},
        "seeds": [*range(seeds)],
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def start(grid: Path, out: Path, executor: str = "local") -> subprocess.Popen[bytes]:
    how = ("--jobs", "2", "--retries", "99", "--checkpoint-every", "0.3", "--executor", executor)
    command = (sys.executable, "-m", "layerzoo", "ablate", "run", str(grid), "--out", str(out))
    return subprocess.Popen([*command, *how], stdout=subprocess.DEVNULL)


def workers(runner: subprocess.Popen[bytes]) -> list[int]:
    lists = Path(f"/proc/{runner.pid}/task").glob("*/children")
    return [int(pid) for path in lists for pid in path.read_text().split()]


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def disturb(grid: Path, out: Path, kills: int, rng: random.Random) -> None:
    """Run a grid to its end and kill a runner or a worker so often on the way."""
    seen: set[int] = set()
    runner = start(grid, out)
    for n in range(kills):
        while True:  # until a cell is under way
            time.sleep(0.05)
            assert runner.poll() is None, f"ended after {n} kills: the grid is too short"
            mine = workers(runner)
            if mine and any(path.stat().st_mtime > time.time() - 2 for path in progress(out)):
                break
        time.sleep(rng.uniform(0, 1.5))
        seen |= {*mine}
        if n % 2 and not gone(victim := rng.choice(mine)):
            os.kill(victim, signal.SIGKILL)
        else:
            runner.kill()
            runner.wait()
            runner = start(grid, out)
    assert runner.wait() == 0
    until = time.monotonic() + 10
    while not all(map(gone, seen)):
        assert time.monotonic() < until, "a worker was left behind"
        time.sleep(0.1)


def progress(out: Path) -> list[Path]:
    return [*out.rglob("progress.json")]


def figures(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All that the cell logged, but for its speed, and the epoch, of which Lightning counts one
    more in the process that ends the training."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = {*events.Tags()["scalars"]} - {"tokens/s", "epoch"}
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def compare(disturbed: Path, undisturbed: Path, cells: int) -> None:
    finished = sorted(p.relative_to(undisturbed) for p in undisturbed.rglob("metrics.json"))
    assert len(finished) == cells
    assert finished == sorted(p.relative_to(disturbed) for p in disturbed.rglob("metrics.json"))
    for path in finished:
        one, other = disturbed / path, undisturbed / path
        assert one.read_text() == other.read_text(), path
        assert figures(one.parent) == figures(other.parent), path
        state: list[Any] = [
            torch.load(p.parent / "checkpoints" / f"step={STEPS}.ckpt", weights_only=True)
            for p in (one, other)
        ]
        for name, weight in state[0]["state_dict"].items():
            assert torch.equal(weight, state[1]["state_dict"][name]), (path, name)


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "seeds"), [(3, 2), (20, 12)])
def test_killed_runs_come_to_the_same_results(tmp_path: Path, kills: int, seeds: int) -> None:
    grid = grid_file(tmp_path, seeds)
    disturb(grid, tmp_path / "disturbed", kills, random.Random(kills))
    assert start(grid, tmp_path / "undisturbed").wait() == 0
    compare(tmp_path / "disturbed", tmp_path / "undisturbed", 2 * seeds)


def test_a_node_of_a_cluster_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("ray")
    from ray.cluster_utils import Cluster

    grid, disturbed = grid_file(tmp_path, 2), tmp_path / "disturbed"
    terminate = signal.getsignal(signal.SIGTERM)
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)  # a short path
        nodes = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        try:
            doomed, _ = (nodes.add_node(num_cpus=1) for _ in range(2))
            runner = start(grid, disturbed, "ray")
            while len(progress(disturbed)) < 2:  # one on each
                time.sleep(0.05)
                assert runner.poll() is None
            nodes.remove_node(doomed, allow_graceful=False)
            assert len([*disturbed.rglob("metrics.json")]) < 4
            assert runner.wait() == 0
        finally:
            nodes.shutdown()
            signal.signal(signal.SIGTERM, terminate)
    assert start(grid, tmp_path / "undisturbed").wait() == 0
    compare(disturbed, tmp_path / "undisturbed", 4)
