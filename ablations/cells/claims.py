"""Claims: what a grid should find, by a published figure or a theory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from layerzoo.spec import Config, SpecError, suggest

from .source import Source


class Claim(Config):
    """An arm's figure, expected.

    arm: as the table names it. metric: of its test split, the mean over seeds counts.
    value: expected, or window_bound: what an arm recalls that answers all in its reach and
        guesses the rest, `ceiling + (1 - ceiling) chance` of its own cells.
    tolerance: the largest absolute difference with which the claim holds.
    source: where the value is from.
    """

    arm: str
    metric: str
    value: float | Literal["window_bound"]
    tolerance: float
    source: str

    def check(self) -> None:
        if not self.tolerance >= 0:
            raise SpecError(f"tolerance: must not be negative, got {self.tolerance}")


def read_claims(source: Source, arms: Sequence[str]) -> list[Claim]:
    """The claims of a grid file, about these arms."""
    claims = []
    for n, fields in enumerate(source.value("expect") or []):
        with source.at("expect", str(n)):
            claim: Claim = Claim.from_fields(fields)
            if claim.arm not in arms:
                raise SpecError(f"arm: no '{claim.arm}'; {suggest(claim.arm, arms)}")
        claims.append(claim)
    return claims
