"""Claims: what a grid should find, by a published figure or a theory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from layerzoo.spec import Config, SpecError, suggest
from layerzoo.support.field_docs import read_config

from .source import Source


class Claim(Config):
    """A figure of an arm, or the difference of two arms' figures, expected."""

    arm: str
    """The claim is about this arm, as the table names it."""
    metric: str
    """It is about this figure of the test split, as a mean over seeds."""
    value: float | Literal["window_bound"]
    """The figure should have this value, or window_bound: `ceiling + (1 - ceiling) chance` of the
    arm's own cells, which an arm recalls that answers all in its reach and guesses the rest."""
    tolerance: float | Literal["sign"]
    """The claim holds up to this absolute deviation. Or it is sign: a difference holds if it has
    the sign of `value`, and 0 has none."""
    source: str
    """The value is from this paper or derivation."""
    minus: str | None = None
    """The claim is about the difference from this other arm, arm - minus."""

    def check(self) -> None:
        if self.minus == self.arm:
            raise SpecError(f"minus: '{self.minus}' is the arm itself; name another")
        if self.value == "window_bound" and self.minus is not None:
            raise SpecError(
                "value: window_bound is of one arm; give the difference, or drop minus"
            )
        if self.tolerance == "sign":
            if self.minus is None:
                raise SpecError("tolerance: sign is of a difference; name an arm in minus")
            if self.value == 0:
                raise SpecError("value: 0 has no sign; give a tolerance, or another value")
        elif not self.tolerance >= 0:
            raise SpecError(f"tolerance: must not be negative, got {self.tolerance}")

    @property
    def subject(self) -> str:
        """What it is about: an arm, or arm - arm."""
        return self.arm if self.minus is None else f"{self.arm} - {self.minus}"


def read_claims(source: Source, arms: Sequence[str]) -> list[Claim]:
    """The claims of a grid file, about these arms."""
    claims = []
    for n, fields in enumerate(source.value("expect") or []):
        with source.locating("expect", str(n)):
            claim: Claim = read_config(Claim, fields)
            for name, arm in (("arm", claim.arm), ("minus", claim.minus)):
                if arm is not None and arm not in arms:
                    raise SpecError(f"{name}: no '{arm}'; {suggest(arm, arms)}")
        claims.append(claim)
    return claims
