"""Cells of a grid are told apart by the data that they read, and never averaged across it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerzoo import SpecError
from layerzoo.ablations.cells import configs
from layerzoo.ablations.cells.cell import identity_of
from layerzoo.ablations.cells.grid import load_grid
from layerzoo.ablations.command import main
from layerzoo.ablations.grid_run import RunOptions, run_grid
from layerzoo.ablations.running.folder import cell_state, prepare_folder, read_json
from layerzoo.ablations.running.worker import run_cell
from layerzoo.train.command import main as train

from .extras import need
from .here import quick

NETWORK = {"vocab_size": 256, "dim": 16, "depth": 1, "layers": [{"name": "linear", "heads": 1}]}


def write(text: str, folder: str = "data") -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for n in range(3):
        Path(folder, f"{n}.txt").write_text(f"{n}: {text} " * 9)


def grid(seeds: int = 2, axes: Any = None, model: Any = None, **data: Any) -> str:
    tree = {
        "name": "tiny",
        "base": {
            "trainer": {"max_steps": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0},
            "model": {"network": NETWORK, **(model or {})},
            "data": {
                "class_path": "Text",
                "init_args": {
                    **{"files": ["data/*.txt"], "length": 8, "batch_size": 2},
                    **{"test_samples": 2, **data},
                },
            },
        },
        "axes": axes or {"model.lr": [0.003, 0.001]},
        "seeds": [*range(seeds)],
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return "tiny.yaml"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    write("the first text")
    with quick():
        yield


def cells(path: str) -> list[dict[str, Any]]:
    """What a run of the grid would list; nothing is trained."""
    assert run_grid(path, RunOptions(out=Path("runs").absolute(), limit=0), tables=False) == 0
    return json.loads(Path("runs/tiny/cells.json").read_text())


def paths(path: str) -> list[str]:
    return [cell["path"] for cell in cells(path)]


def trained(path: str) -> list[str]:
    """Run the cells that have not ended, here, and report; the folders of those that ran."""
    ran = [p for p in paths(path) if cell_state(Path("runs/tiny", p)) != "finished"]
    for each in ran:
        assert run_cell(Path("runs/tiny", each), 30, 1).end == "finished"
    cells(path)
    return ran


def test_changed_data_makes_new_cells() -> None:
    old = trained(grid(1))
    first = {p: p.read_bytes() for p in Path("runs").rglob("metrics.json")}
    assert len(old) == len(first) == 2
    write("another text, which is easier to tell. another text")
    new = trained(grid(1))
    assert len(new) == 2 and not {*new} & {*old}
    summary = json.loads(Path("runs/tiny/report/summary.json").read_text())
    assert {folder for arm in summary["arms"] for folder in arm["folders"]} == {*new}
    assert {p: p.read_bytes() for p in first} == first
    found = [read_json(Path("runs/tiny", folder, "record.json"))["digest"] for folder in new]
    assert [*found[0]] == ["data.files"] and all(each == found[0] for each in found)
    # What is changed back finds its own again.
    write("the first text")
    assert trained(grid(1)) == []


def test_the_working_directory_is_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = paths(grid())
    shutil.copytree("data", "same/data")
    write("another text", "other/data")
    for folder, same in (("same", True), ("other", False)):
        shutil.copy("tiny.yaml", folder)
        monkeypatch.chdir(folder)
        assert (paths("tiny.yaml") == before) == same
        monkeypatch.chdir("..")


def test_a_tokenizer_and_a_dataset_are_read_too() -> None:
    library = need("tokenizers")
    need("datasets")

    def tokenizer(*words: str) -> None:
        vocab = {word: n for n, word in enumerate(words)}
        made = library.Tokenizer(library.models.WordLevel(vocab, unk_token=words[0]))
        made.pre_tokenizer = library.pre_tokenizers.Whitespace()
        made.save("tokenizer.json")

    def dataset(text: str) -> None:
        Path("rows").mkdir(exist_ok=True)
        lines = (json.dumps({"text": f"{n}: {text} " * 9}) for n in range(4))
        Path("rows/train.jsonl").write_text("\n".join(lines))

    tokenizer("a", "text")
    dataset("the first text")
    path = grid(files=None, dataset="rows", tokenizer="tokenizer.json")
    before = cells(path)
    assert [*before[0]["digest"]] == ["data.dataset", "data.tokenizer"]
    dataset("another text")
    assert not {*paths(path)} & {cell["path"] for cell in before}
    dataset("the first text")
    assert paths(path) == [cell["path"] for cell in before]
    tokenizer("a", "text", "first")
    assert not {*paths(path)} & {cell["path"] for cell in before}


def test_a_task_is_not_kept_when_what_it_read_has_changed() -> None:
    library = need("tokenizers")

    def tokenizer(count: int) -> None:
        vocab = {f"{n}": n for n in range(count)}
        library.Tokenizer(library.models.WordLevel(vocab, unk_token="0")).save("tokenizer.json")

    tokenizer(200)
    path = grid(tokenizer="tokenizer.json")
    assert configs.task_of(load_grid(path).cells()[0].config).vocab_size == 200
    tokenizer(300)
    with pytest.raises(SpecError, match="beyond the model's vocabulary of 256"):
        load_grid(path)


def test_cells_that_read_nothing_are_what_they_were() -> None:
    Path("mqar.yaml").write_text("{name: a, base: mqar, axes: {model.lr: [0.1]}, seeds: [0]}")
    plain = load_grid("mqar.yaml").cells()[0]
    assert plain.digest == {} and plain.identity == identity_of(plain.config)
    assert load_grid("mqar.yaml", digests=True).cells()[0] == plain
    assert identity_of(plain.config, {"data.files": "another"}) != plain.identity


def test_a_plan_reads_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    path = grid(files=["not/there"])
    assert main(["plan", path, "--no-probe"]) == 0
    with pytest.raises(SpecError, match=r"tiny.yaml:\d+: base: data: Text: files: nothing match"):
        run_grid(path, RunOptions(out=Path("runs")))


# A cell's own data


def one(path: str) -> Path:
    (cell, *_) = load_grid(path, digests=True).cells()
    return prepare_folder(cell, Path("runs"))


def test_a_cell_whose_data_has_changed_fails() -> None:
    folder = one(grid())
    write("something else")
    message = r"^data.files: its contents are others here \(\w{12}\) than when the run began"
    with pytest.raises(SpecError, match=message):
        run_cell(folder, 30, 1)
    assert not (folder / "metrics.json").exists() and not (folder / "checkpoints").exists()
    write("the first text")
    assert run_cell(folder, 30, 1).end == "finished"


def test_a_killed_cell_does_not_go_on_with_other_data() -> None:
    folder = one(grid())
    assert run_cell(folder, 30, 1, stop=lambda: True).end == "stopped"
    assert [*folder.glob("checkpoints/*.ckpt")]
    write("something else")
    about = read_json(folder / "cell.json")
    del about["digest"]  # of an older version: its checkpoint says it, too
    (folder / "cell.json").write_text(json.dumps(about))
    with pytest.raises(SpecError, match=r"^data.files: its contents are others"):
        run_cell(folder, 30, 1)


# Weights to start from


def test_weights_to_start_from_are_part_of_a_cell() -> None:
    folder = one(grid())
    assert run_cell(folder, 30, 1).end == "finished"
    for seed, name in enumerate("ab"):
        options = ["--config", str(folder / "config.yaml"), f"--model.lr={seed + 1}e-3"]
        options += [f"--trainer.default_root_dir={name}", "--trainer.logger=false"]
        assert train(["fit", *options]) == 0
    starts = {n: next(str(p) for p in Path(n).rglob("*.ckpt")) for n in "ab"}
    shutil.copy(starts["a"], "start.ckpt")
    path = grid(1, axes={"model.lr": [0.003]}, model={"init": "start.ckpt"})
    (first,) = cells(path)
    assert [*first["digest"]] == ["data.files", "model.init"]
    assert trained(path) == [first["path"]]
    record = read_json(Path("runs/tiny", first["path"], "record.json"))
    assert record["digest"] == first["digest"]
    shutil.copy(starts["b"], "start.ckpt")
    assert paths(path) != [first["path"]]
    network = {**NETWORK, "dim": 32}
    path = grid(1, model={"init": "start.ckpt", "network": network})
    with pytest.raises(SpecError, match=r"base: model.init: model.network.dim: 32, but the net"):
        cells(path)


# Reports


def test_a_report_refuses_cells_of_other_data_than_their_arms(
    write_results: Callable[..., Path],
) -> None:
    root = write_results(lambda arm, seed: {"accuracy/all": 0.5}, axes={"x": {"a": {}, "b": {}}})
    assert main(["report", str(root)]) == 0
    for seed, contents in enumerate(("1" * 64, "1" * 64, "2" * 64)):
        path = root / f"b/seed-{seed}/record.json"
        path.write_text(json.dumps({**read_json(path), "digest": {"data.files": contents}}))
    with pytest.raises(SpecError) as error:
        main(["report", str(root)])
    assert re.fullmatch(
        rf"{root}: arm b: its cells were trained on different data \(data.files: {'1' * 12} in "
        rf"b/seed-0, {'2' * 12} in b/seed-2\); remove those of one and run the grid again",
        str(error.value),
    )
