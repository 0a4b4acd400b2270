"""What else differs between the arms that a report compares, read from the cells' folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..cells.confounds import NAMED, Confounds, Pair, confounds, pairs_of
from ..cells.differences import Side
from ..cells.sizes import NAMES
from ..running.folder import CONFIG
from .numbers import is_accuracy
from .results import Results
from .rows import Row
from .statistics import SUCCESS, success_rate

LEARNED = f"seeds that reach {SUCCESS:.0%}"
ENOUGH = 0.5
"""An arm has learned if at least this share of its seeds reaches SUCCESS."""


def confounds_of(results: Results, rows: Sequence[Row]) -> Confounds:
    """The confounds of all arms that have a cell with a config in its folder."""
    sides: dict[str, Side] = {}
    for cell in results.cells:
        if cell.arm not in sides and (results.root / cell.path / CONFIG).is_file():
            solved = frozenset(cell.matched.get("solved", {}))
            sides[cell.arm] = Side(cell.options, results.config(cell), solved)
    measured = {row.arm: row.cells[0].metrics for row in rows if row.cells}
    figures = {arm: {n: found[n] for n in NAMES if n in found} for arm, found in measured.items()}
    scores = {row.arm: row.scores for row in rows if row.scores and is_accuracy(row.headline)}
    learned = {arm: success_rate(values) for arm, values in scores.items()}
    for arm, share in learned.items():
        figures[arm][LEARNED] = f"{share * len(scores[arm]):.0f}/{len(scores[arm])}"
    pairs = pairs_of(results.report, results.claims, results.arms)
    matched = results.fields.match is not None
    found = confounds(sides, pairs, results.axes, results.tuning, figures, matched)
    found.warnings.extend(_unlearned(pairs, learned, results.windows))
    return found


def _unlearned(
    pairs: Sequence[Pair], learned: Mapping[str, float], windows: Sequence[str]
) -> list[str]:
    """A line that names arms that did not learn and are compared with arms that did."""
    arms: dict[str, None] = {}
    for pair in pairs:
        if not all(arm in learned for arm in pair):
            continue
        low, high = sorted(pair, key=lambda arm: learned[arm])
        if learned[low] < ENOUGH <= learned[high] and low not in windows:
            arms[low] = None
    if not arms:
        return []
    more = f" and {len(arms) - NAMED} more" if len(arms) > NAMED else ""
    return [
        f"{'; '.join([*arms][:NAMED])}{more}: under half of the seeds reach {SUCCESS:.0%}, and at "
        f"least half do in arms that are compared with them, so that the difference may be one of "
        f"learning and not of what the rule can hold; give more updates, another learning rate or "
        f"norm before you call an arm unable"
    ]
