"""A resumed run goes on with what its checkpoint was trained on, or is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from layerzoo.spec import SpecError, error_at
from layerzoo.train.find_checkpoint import find_checkpoint
from layerzoo.train.lit import read_checkpoint, read_weights
from layerzoo.train.trained_on import (
    TRAINED_ON,
    digest_weights,
    digests,
    refuse_changed,
    trained_on,
)


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that training goes on from.

    before: what it was trained on, see `trained_on`; None if it is of an older version. init:
    whether the module takes weights to start from.
    """

    path: str
    before: dict[str, Any] | None
    init: bool = True

    @classmethod
    def of(cls, path: str | Path) -> Resumed:
        return cls(str(path), read_checkpoint(path).get(TRAINED_ON))

    @property
    def digest(self) -> dict[str, str]:
        """Of what was read, by option."""
        return {} if self.before is None else self.before["digest"]

    @property
    def way_out(self) -> str:
        start = f"start a new run from its weights: --model.init {self.path}"
        return f"take its config, or {start if self.init else 'train anew'}"

    def check(self, trainer: Any, module: Any, task: Any, seed: Any) -> None:
        """Raise for the first of what the run would go on with that is other than before. How a
        path is written does not count, if what it leads to is the same.

        Raises:
            SpecError: another task, option, seed or setting of the trainer, or other data.
        """
        if self.before is None:
            rank_zero_warn(
                f"checkpoint {self.path}: is of an older version and does not say what it was "
                f"trained on: data, batch size, seeds and task options are not checked"
            )
            return
        now = trained_on(trainer, module, task, seed)
        read = now["digest"].keys() & self.digest.keys()
        for name, before in self.before["settings"].items():
            given = now["settings"].get(name, before)
            chosen = name == "seed_everything" and given is True  # any will do
            if name not in read and given != before and not chosen:
                raise SpecError(
                    f"{name}: {given}, but the checkpoint to resume was trained with {before}; "
                    f"{self.way_out}"
                )
        for name in sorted(read):
            if now["digest"][name] != self.digest[name]:
                raise SpecError(
                    f"{name}: its contents are others ({now['digest'][name][:12]}) than those "
                    f"that the checkpoint to resume was trained with ({self.digest[name][:12]}); "
                    f"{self.way_out}"
                )


def check_cell(cli: Any, made: dict[str, str] | None, resume: Path | None) -> None:
    """Raise if what a cell of a grid reads is not what it was when the cell was made, or what the
    checkpoint that it goes on from was trained on.

    Args:
        cli: with its trainer, model and datamodule. made: digests; None of an older version.

    Raises:
        SpecError: it has changed.
    """
    start: dict[str, str] = {}
    if resume is None:
        cli.model.begin()
    else:
        resumed = Resumed.of(resume)
        resumed.check(cli.trainer, cli.model, cli.datamodule, cli.config["seed_everything"])
        start = {name: x for name, x in resumed.digest.items() if name == "model.init"}
    refuse_changed({**start, **digests(cli.model, cli.datamodule)}, made)


def same_start(asked: str | None, trained: str | None, resumed: Resumed) -> None:
    """Refuse to start from other weights than the run that is resumed did. Those that it started
    from may be gone.

    Raises:
        SpecError: they are others, or it started from none.
    """
    if asked is None:
        return
    if trained is None:
        raise SpecError(
            f"model.init: {asked}, but a resumed run has the weights of --ckpt_path; drop one of "
            f"the two"
        )
    before = resumed.digest.get("model.init")
    if before is not None and Path(asked).exists():
        with error_at("model.init"):
            now = digest_weights(read_weights(find_checkpoint(asked))[1])
        if now != before:
            raise SpecError(
                f"model.init: {asked}, but the checkpoint to resume started from other weights, "
                f"{trained}; {resumed.way_out}"
            )
