"""Where the checkpoints of runs are, and which of them is meant."""

from __future__ import annotations

import re
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from layerzoo.spec import SpecError
from layerzoo.train.checkpoints import WORDS
from layerzoo.train.lit import read_checkpoint


def find_checkpoint(name: str | Path, runs: str | Path = "runs") -> str:
    """The file of the checkpoint that a user names.

    Args:
        name: one of four things. A file. A folder of a run, for its newest readable checkpoint,
            or a folder of several runs, for the newest run. `last`, for the newest run. `best`,
            for the checkpoint of the newest run whose held-out figure was the best, if its
            ModelCheckpoint monitors one. A file or folder called `last` or `best` is taken first.
        runs: the folder of runs in which `last` and `best` look.

    Raises:
        SpecError: there is none.
    """
    name = str(name)
    word = name.partition(":")[0]
    if Path(name).is_dir():
        if (found := _newest_in(Path(name))) is None:
            raise SpecError(
                f"checkpoint {name}: no checkpoint to read in it or its folder checkpoints; "
                f"give a run's folder, or a .ckpt file"
            )
        return found
    if Path(name).exists() or word not in WORDS:
        return name
    if word not in ("last", "best"):
        raise SpecError(
            f"checkpoint {name}: layerzoo has no such place; give a run's folder, a .ckpt file, "
            f"last or best"
        )
    if (newest := _newest_in(Path(runs))) is None:
        raise SpecError(
            f"checkpoint {name}: there is no run in {runs} yet; give a run's folder, or a .ckpt "
            f"file, or train anew without one"
        )
    return newest if word == "last" else _best(newest)


def _newest_in(folder: Path) -> str | None:
    """The newest readable checkpoint of a run's folder, else of the newest run in a folder of
    runs, else of the newest in a folder of such folders."""
    if (found := newest_checkpoint(folder)) is not None:
        return str(found)
    for inside in ("*/*.ckpt", "*/checkpoints/*.ckpt", "*/*/checkpoints/*.ckpt"):
        files = sorted(folder.glob(inside), key=lambda path: path.stat().st_mtime_ns)
        for run in dict.fromkeys(path.parent for path in reversed(files)):
            if (found := newest_checkpoint(run)) is not None:
                return str(found)
    return None


def _best(newest: str) -> str:
    """What the run that saved a checkpoint held for its best."""
    states = read_checkpoint(newest).get("callbacks", {}).values()
    found = [state for state in states if state.get("monitor") and state.get("best_model_path")]
    if not found:
        raise SpecError(
            f"checkpoint best: the run of {newest} compared no checkpoints; train with "
            f"--trainer.callbacks.monitor loss/held_out, or give last"
        )
    path = Path(found[0]["best_model_path"])
    beside = Path(newest).with_name(path.name)  # the run's folder may have moved
    if not (path := beside if beside.is_file() else path).is_file():
        raise SpecError(f"checkpoint best: {path} is gone; give last, or another checkpoint")
    return str(path)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The readable checkpoint of most steps in a folder or its `checkpoints`, None without any;
    warns of each that it skips because it is damaged."""
    named: list[tuple[int, float, Path]] = []
    for path in (p for where in (".", "checkpoints") for p in Path(folder, where).glob("*.ckpt")):
        step = re.search(r"step=(\d+)", path.name)
        if (number := int(step[1]) if step else _step(path)) is not None:
            named.append((number, path.stat().st_mtime, path))
    return next((p for _, _, p in sorted(named, reverse=True) if _step(p) is not None), None)


def _step(path: Path) -> int | None:
    try:
        return read_checkpoint(path)["global_step"]
    except SpecError as error:
        rank_zero_warn(f"skipped: {error}")
        return None


def first_step(checkpoint: Path | None) -> int:
    """The step that a run logs first when it goes on from a checkpoint, or starts anew. Where the
    killed run has logged into the same folder: `TensorBoardLogger(.., purge_step=first_step(c))`
    hides what it logged from there on."""
    return 0 if checkpoint is None else read_checkpoint(checkpoint)["global_step"]
