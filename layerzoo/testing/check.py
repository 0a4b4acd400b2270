"""Check: one law for one case. It holds, or it says what is broken and where."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path


class Broken(AssertionError):
    """A law does not hold. The message names the law, the case, the place and a usual cause."""


class Law(NamedTuple):
    """What has to hold for every case.

    name: a word for ids and tables.
    statement: the law in a sentence.
    cause: what usually breaks it.
    run: raises `Broken` for a case of which it does not hold.
    applies: whether a case is one that the law is about.
    slow: whether a quick check leaves it out.
    once: what the law is about, of which one case is enough; None is the case itself.
    """

    name: str
    statement: str
    cause: str
    run: Callable[[Any], None]
    applies: Callable[[Any], bool]
    slow: bool
    once: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Check:
    """One law for one case of a layer or a task. Calling it runs it.

    law: what has to hold.
    case: what it is checked for; its `str` is part of the id.
    """

    law: Law
    case: Any

    def __str__(self) -> str:
        return f"{self.case}-{self.law.name}"

    def __call__(self) -> None:
        """Run the check.

        Raises:
            Broken: the law does not hold.
        """
        law = self.law
        about = f"law: {law.statement}\ncase: {self.case.told}"
        try:
            law.run(self.case)
        except Broken as error:
            text = f"{self.case} breaks a law: {error}\n{about}\nusual cause: {law.cause}"
            raise Broken(text) from None
        except Exception as error:
            error.add_note(f"{self.case} raised this in a check.\n{about}")
            raise


def laws(
    found: list[Law],
) -> Callable[..., Callable[[Callable[[Any], None]], Callable[[Any], None]]]:
    """A decorator that adds its function to the list as a law. The docstring is the statement."""

    def law(
        cause: str,
        applies: Callable[[Any], bool] = lambda case: True,
        slow: bool = False,
        once: Callable[[Any], Any] | None = None,
    ) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
        def add(run: Callable[[Any], None]) -> Callable[[Any], None]:
            statement = " ".join((run.__doc__ or "").split())
            found.append(Law(run.__name__, statement, cause, run, applies, slow, once))
            return run

        return add

    return law


def checks(found: Iterable[Law], cases: Iterable[Any], quick: bool) -> list[Check]:
    """All laws for all cases that they are about."""
    cases, made = [*cases], list[Check]()
    for law in found:
        if quick and law.slow:
            continue
        about = [case for case in cases if law.applies(case)]
        if law.once is not None:
            about = {law.once(case): case for case in reversed(about)}.values()
        made += [Check(law, case) for case in about]
    return made


def require(condition: Any, message: str) -> None:
    """Raise `Broken` with the message unless the condition holds."""
    if not condition:
        raise Broken(message)


def named(tree: Any) -> dict[str, Tensor]:
    """The tensors of a pytree by name, such as state['k'], if its dict has an entry state."""
    found = {}
    for path, leaf in tree_flatten_with_path(tree)[0]:
        first = getattr(path[0], "key", None) if path else None
        found[f"{first}{keystr(path[1:])}" if isinstance(first, str) else keystr(path)] = leaf
    return found


def require_close(got: Any, want: Any, tolerance: float, where: str = "") -> None:
    """Raise `Broken` unless two pytrees have the same leaves, equal within the tolerance.

    Args:
        got, want: dicts whose keys say what a leaf is, such as output and state.
        tolerance: of the largest entry of a leaf; 0 means equal to the bit.
        where: what was run, for the message.
    """
    xs, ys = named(got), named(want)
    at = f"{where}: " if where else ""
    require(xs.keys() == ys.keys(), f"{at}it has {_list(xs)}, and should have {_list(ys)}")
    for name, x in xs.items():
        y = ys[name]
        mine, theirs = (f"{[*t.shape]} of {str(t.dtype)[6:]}" for t in (x, y))
        require(mine == theirs, f"{at}{name} is {mine}, and should be {theirs}")
        require(torch.isfinite(x).all(), f"{at}{name} is not finite")
        if not y.numel():
            continue
        difference = (
            float((x.detach() - y.detach()).abs().max())
            if x.dtype.is_floating_point
            else float((x != y).any())
        )
        # The floor is for exact zeros, such as the gradient of a softmax over one key.
        allowed = tolerance * max(float(y.detach().abs().max()), 1e-3)
        require(
            difference <= allowed,
            f"{at}{name} differs by {difference:.3g} at most, and {allowed:.3g} is allowed",
        )


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
