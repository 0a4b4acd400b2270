"""Arms of equal size: a stub, which changes nothing."""

from __future__ import annotations

from typing import Any, Literal

from layerzoo.spec import Config

from .configs import Tree


class Match(Config):
    by: Literal["parameters", "flops", "state_bytes"]
    to: dict[str, str] | str | float
    tolerance: float = 0.05
    solve: tuple[str, ...] = ("heads", "dim")


def matched(
    match: Match, configs: dict[str, Tree], arms: dict[str, dict[str, str]]
) -> dict[str, tuple[Tree, dict[str, Any]]]:
    return {arm: (config, {}) for arm, config in configs.items()}
