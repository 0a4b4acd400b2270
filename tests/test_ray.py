"""Cells on a Ray cluster: what ends how, what a dead node takes with it, and what is left behind.

A cell is a function here that writes down where it runs; `make test-all` installs the extra.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from layerzoo.ablations.running.executor import Outcome
from layerzoo.ablations.running.on_ray import RayExecutor, _room
from layerzoo.spec import SpecError

from .extras import need

FINISHED = Outcome("finished")


def cell(folder: Path) -> Outcome:
    """Do what the folder's name says; write the process and the node, then a line a moment."""
    import ray

    stop: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: stop.append(number))
    where = {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}
    (folder / "part").write_text(json.dumps(where))
    os.replace(folder / "part", folder / "where")
    print("what a cell prints is its node's")
    try:
        match folder.name.split("-")[0]:
            case "quick":
                return FINISHED
            case "busy":
                return Outcome("busy")
            case "raises":
                raise ValueError("a first line\nthe last line")
            case "leaves":
                os._exit(1)
            case "deaf":
                time.sleep(60)
        while not stop and not (folder / "go").exists():
            time.sleep(0.02)
        if stop:
            (folder / "saved").touch()
        return Outcome("stopped") if stop else FINISHED
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head, which runs nothing, and two nodes with a CPU each, one of them with a GPU too."""
    need("ray")
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    terminate = signal.getsignal(signal.SIGTERM)
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as env:
        env.setenv("RAY_TMPDIR", folder)  # apart from a cluster of the user's, and a short path
        soon = {"health_check_period_ms": 300}  # till the head takes a node for dead; else 14 s
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon}
        nodes = Cluster(True, head_node_args=head)
        env.setenv("RAY_ADDRESS", nodes.address)
        nodes.add_node(num_cpus=1)
        nodes.add_node(num_cpus=1, num_gpus=1)
        yield nodes
        nodes.shutdown()
    signal.signal(signal.SIGTERM, terminate)


@pytest.fixture
def make(cluster: Any) -> Iterator[Callable[..., RayExecutor]]:
    made: list[RayExecutor] = []

    def executor(**options: Any) -> RayExecutor:
        made.append(RayExecutor(cell, **{"gpus": 0, **options}))
        return made[-1]

    yield executor
    for one in made:
        one.close(0)


def start(executor: RayExecutor, *folders: Path) -> None:
    for folder in folders:
        folder.mkdir(exist_ok=True)
        executor.start(folder)


def where(folder: Path) -> Any:
    """Of a cell that has started: its process and its node."""
    until(lambda: (folder / "where").exists())
    return json.loads((folder / "where").read_text())


def outcomes(executor: RayExecutor, count: int) -> dict[str, Outcome]:
    ended: dict[str, Outcome] = {}
    until(lambda: ended.update((p.name, o) for p, o in executor.ended(0.1)) or len(ended) >= count)
    return ended


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_ends(
    make: Callable[..., RayExecutor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a worker is elsewhere
    terminate = signal.getsignal(signal.SIGTERM)
    executor = make()
    assert signal.getsignal(signal.SIGTERM) is terminate
    assert executor.slots == 2
    assert executor.ended(0) == []
    start(executor, *map(Path, ("quick", "busy", "raises", "leaves")))
    assert outcomes(executor, 4) == {
        "quick": FINISHED,
        "busy": Outcome("busy"),
        "raises": Outcome("failed", "the last line"),
        "leaves": Outcome("failed", "its worker died"),
    }


def test_a_cell_takes_a_gpu_of_a_cluster_that_has_any(make: Callable[..., RayExecutor]) -> None:
    assert make(gpus=None).slots == 1


def test_room(make: Callable[..., RayExecutor]) -> None:
    assert make(gpus=0.1).slots == 1  # its node has one CPU
    assert _room({"CPU": 16.0, "GPU": 1.0}, {"CPU": 1, "GPU": 0.1}) == 10
    assert make(slots=5).slots == 5
    with pytest.raises(SpecError, match=r"no node .* has 2 CPU and 1 GPU; give a cell less"):
        make(threads=2, gpus=1)
    with pytest.raises(SpecError, match=r"must be whole above 1, got 1\.5"):
        make(gpus=1.5)


@pytest.mark.parametrize("connected", [False, True])
def test_closing(make: Callable[..., RayExecutor], tmp_path: Path, connected: bool) -> None:
    """A cell gets time to stop; one that does not is killed; the cluster stays, and so does a
    connection that is not the executor's."""
    import ray

    if connected:
        ray.init("auto", log_to_driver=False)
    executor = make()
    stops, deaf, queued = (tmp_path / name for name in ("stops", "deaf", "queued"))
    start(executor, stops, deaf)
    pids = [where(folder)["pid"] for folder in (stops, deaf)]
    start(executor, queued)
    began = time.monotonic()
    executor.close(1)
    assert time.monotonic() - began > 1
    until(lambda: not any(map(runs, pids[connected:])), 2)  # what stopped waits for more cells
    assert (stops / "saved").exists() and not (queued / "where").exists()
    assert ray.is_initialized() is connected
    again = make()
    start(again, tmp_path / "quick")
    assert outcomes(again, 1) == {"quick": FINISHED}
    ray.shutdown()


def test_a_node_dies(
    make: Callable[..., RayExecutor],
    cluster: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its cell fails, and finishes elsewhere when it is started again; the other's goes on."""
    import ray

    executor = make()
    a, b = tmp_path / "a", tmp_path / "b"
    start(executor, a, b)
    dead, alive = where(a), where(b)
    assert dead["node"] != alive["node"]
    (node,) = (n for n in cluster.worker_nodes if n.node_id == dead["node"])
    cluster.remove_node(node, allow_graceful=False)
    assert outcomes(executor, 1) == {"a": Outcome("failed", "its node died")}
    until(lambda: not runs(dead["pid"]), 5)
    # Started before the head knows, it would wait on a node that does not answer.
    until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2)
    (a / "where").unlink()
    start(executor, a)
    (b / "go").touch()
    assert outcomes(executor, 1) == {"b": FINISHED}
    assert where(a)["node"] == alive["node"]
    (a / "go").touch()
    assert outcomes(executor, 1) == {"a": FINISHED}
    assert capfd.readouterr() == ("", "")
    cluster.add_node(num_cpus=1)


def test_another_version(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.__version__", "1.0")
    with pytest.raises(SpecError, match=r"started with: Ray: 2.* Ray: 1\.0 .*; run on a node"):
        RayExecutor(cell)


def test_no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need("ray")
    way = "start one with 'ray start --head', or run with --executor local"
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", functools.cache(list))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SpecError, match=f"^no Ray cluster runs here; {way}$"):
        RayExecutor(cell)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    with pytest.raises(SpecError, match=f"^no Ray cluster at RAY_ADDRESS=nowhere; {way}$"):
        RayExecutor(cell)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SpecError, match=r"needs the ray extra: pip install 'layerzoo\[ray\]'"):
        RayExecutor(cell)
