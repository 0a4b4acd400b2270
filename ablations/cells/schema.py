"""The fields of a grid file. ablations/README.md has an example of each."""

from __future__ import annotations

from typing import Any, Literal

from layerzoo.spec import Config, SpecError, error_at
from layerzoo.train.command import MAX_SEED

from .axes import checked_folder_name
from .cell import Seed
from .source import Source


class Fields(Config):
    """The fields of a grid file."""

    name: str
    """The grid and its folder of results have this name."""
    base: str | dict[str, Any]
    """The base is a shipped config's name, a path relative to the grid file, or the training
    config itself."""
    axes: dict[str, Any]
    """Each axis has options, in one of three forms (see `ablations/README.md`)."""
    seeds: tuple[int | dict[str, int], ...] = (0, 1, 2)
    """Each arm runs with each seed: a number for initialisation and data, or {init: 0, data: 10}.
    Cells of one seed are paired."""
    set: dict[str, Any] | None = None
    """These overrides are for every cell: dotted config keys and their values."""
    budget: int | None = None
    """Each run has this many updates. It sets `trainer.max_steps`."""
    when: dict[str, Any] | None = None
    """An axis applies to some arms only: axis -> {earlier axis: option or options}."""
    exclude: tuple[dict[str, Any], ...] = ()
    """These arms are left out, each as {axis: option or options, ..}."""
    design: Literal["product", "one_at_a_time"] = "product"
    """The arms are the product of the axes, or one_at_a_time: the baseline, which is the first
    option of every axis, and the arms that differ from it in one axis."""
    window_arm: dict[str, Any] | None = None
    """axis -> option names the arms whose models' reach defines the ceiling of all arms."""
    match: dict[str, Any] | None = None
    """The arms are made equally large by these fields of `Match`."""
    tune: dict[str, Any] | None = None
    """Options are tuned for each arm by these fields of `Tune`."""
    report: dict[str, Any] | None = None
    """The report compares cells by these fields of `Report`."""
    expect: tuple[dict[str, Any], ...] = ()
    """The grid claims published figures, each by the fields of `Claim`."""
    minutes: float | None = None
    """A run takes this long on 2 CPU cores, measured or planned. Grids with claims have it."""
    sizes: dict[str, Any] | None = None
    """Each size has a name, and the fields that it changes."""
    size: str | None = None
    """This size is run, if the command names none."""

    def check(self) -> None:
        with error_at("name"):
            checked_folder_name(self.name)
        if self.budget is not None and self.budget < 1:
            raise SpecError(f"budget: must be at least 1, got {self.budget}")
        if self.minutes is not None and not self.minutes > 0:
            raise SpecError(f"minutes: must be positive, got {self.minutes}")


def read_seeds(source: Source, *place: str) -> tuple[Seed, ...]:
    seeds: list[Seed] = []
    given = source.value(*place)
    for n, value in enumerate((0, 1, 2) if given is None else given):
        with source.locating(*place, str(n)):
            if isinstance(value, dict):
                for name in [*value, *Seed._fields]:
                    if name not in Seed._fields or name not in value:
                        raise SpecError(f"expected init and data, got {', '.join(value)}")
            seed = Seed(**value) if isinstance(value, dict) else Seed(value, value)
            if any(type(part) is not int or part < 0 for part in seed):
                raise SpecError(f"must be whole and not negative, got {value}")
            if seed.init > MAX_SEED:
                raise SpecError(f"must be at most {MAX_SEED} for the initialisation, got {value}")
            if seed in seeds:
                raise SpecError(f"{value} is there already; a seed counts once")
        seeds.append(seed)
    if not seeds:
        raise source.error(place, "needs at least one")
    return tuple(seeds)
