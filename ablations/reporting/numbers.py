"""How figures are written."""

from __future__ import annotations

import math
import re

from .statistics import Estimate

NOTHING = "-"
_SHARE = re.compile(
    r"(accuracy(_\w+)?|errors|continual(_matrix)?|recall_\w+)/.*"
    r"|recall/(?!queries|half_life).*"
    r"|chance"
)


def is_share(name: str) -> bool:
    """Whether a figure is one of all answers, or a difference of such; they are shown in %."""
    return _SHARE.fullmatch(name) is not None


def is_accuracy(name: str) -> bool:
    """Whether a figure is the share of right answers."""
    return is_share(name) and not name.startswith("errors/")


def column_head(name: str) -> str:
    """Of a column, in lines."""
    return f"{name}\n(%)" if is_share(name) else name


def estimate_text(name: str, estimate: Estimate, sign: str = "") -> str:
    """A mean with its interval, if it has one. A mean that is not finite is shown as nan or inf;
    without any value there is nothing to show.

    Args:
        sign: "+" shows the sign of a difference.
    """
    if estimate.n == 0:
        return NOTHING
    share = is_share(name)
    mean = f"{100 * estimate.mean:{sign}.1f}" if share else f"{estimate.mean:{sign}.4g}"
    if math.isnan(estimate.half):
        return mean
    return f"{mean} ±{100 * estimate.half:.1f}" if share else f"{mean} ±{estimate.half:.2g}"


def mean_text(estimate: Estimate, form: str) -> str:
    return NOTHING if estimate.n == 0 else form.format(estimate.mean)


def p_text(p: float | None) -> str:
    if p is None:
        return NOTHING
    return "<0.001" if p < 0.001 else f"{p:.3f}"
