"""The fields of a grid file. ablations/README.md has an example of each."""

from __future__ import annotations

from typing import Any, Literal

from layerzoo.spec import Config, SpecError, at
from layerzoo.training import MAX_SEED

from .axes import folder_name
from .cell import Seed
from .source import Source


class Fields(Config):
    """A grid file.

    name: of the grid and its folder of results.
    base: a shipped config's name, a path relative to the grid file, or the training config.
    axes: axis -> options, in one of three forms (see `ablations/README.md`).
    seeds: each arm runs with each: a number for initialisation and data, or {init: 0, data: 10};
        cells of one seed are paired.
    set: overrides for every cell, dotted config keys and their values.
    budget: updates of each run; it sets `trainer.max_steps`.
    when: axis -> {earlier axis: option or options}: the arms that the axis applies to.
    exclude: arms left out, each {axis: option or options, ..}.
    design: of the arms. one_at_a_time is the baseline, the first option of every axis, and what
        differs from it in one axis.
    window_arm: axis -> option of the arms whose models' reach defines the ceiling of all.
    match: the fields of `Match`. tune: of `Tune`. report: of `Report`. expect: of `Claim`s.
    minutes: how long a run takes on 2 CPU cores, measured or planned; for grids with claims.
    sizes: names, and the fields that each changes, see `Source`. size: the one that is meant.
    """

    name: str
    base: str | dict[str, Any]
    axes: dict[str, Any]
    seeds: tuple[int | dict[str, int], ...] = (0, 1, 2)
    set: dict[str, Any] | None = None
    budget: int | None = None
    when: dict[str, Any] | None = None
    exclude: tuple[dict[str, Any], ...] = ()
    design: Literal["product", "one_at_a_time"] = "product"
    window_arm: dict[str, Any] | None = None
    match: dict[str, Any] | None = None
    tune: dict[str, Any] | None = None
    report: dict[str, Any] | None = None
    expect: tuple[dict[str, Any], ...] = ()
    minutes: float | None = None
    sizes: dict[str, Any] | None = None
    size: str | None = None

    def check(self) -> None:
        with at("name"):
            folder_name(self.name)
        if self.budget is not None and self.budget < 1:
            raise SpecError(f"budget: must be at least 1, got {self.budget}")
        if self.minutes is not None and not self.minutes > 0:
            raise SpecError(f"minutes: must be positive, got {self.minutes}")


def read_seeds(source: Source, *place: str) -> tuple[Seed, ...]:
    seeds: list[Seed] = []
    given = source.value(*place)
    for n, value in enumerate((0, 1, 2) if given is None else given):
        with source.at(*place, str(n)):
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
