"""The checks of layers."""

from __future__ import annotations

from layerzoo.registry import list_layers
from layerzoo.testing import arithmetic_laws, sequence_laws
from layerzoo.testing.cases import cases
from layerzoo.testing.check import Check, checks

LAWS = [*sequence_laws.LAWS, *arithmetic_laws.LAWS]


def layer_checks(*names: str, quick: bool = False) -> list[Check]:
    """The checks of registered layers: every law, for every case and implementation.

    Args:
        names: the layers; none means all that are registered.
        quick: leave out compilation and low precision, which take seconds each.

    Returns:
        checks, to be called; `str` of one is its id, such as `linear-0-chunked-pieces`.

    Raises:
        SpecError: an unknown name, or a case that cannot be built.
    """
    found = (case for name in names or list_layers() for case in cases(name))
    return checks(LAWS, found, quick)
