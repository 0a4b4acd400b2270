"""What else differs between the arms that a report compares, read from the cells' folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..cells.confounds import NAMED_AT_MOST, ArmPair, Confounds, compared_pairs, find_confounds
from ..cells.differences import ComparedArm
from ..cells.sizes import SIZE_NAMES
from ..running.folder import CONFIG
from .numbers import is_accuracy
from .results import GridResults
from .rows import ArmRow
from .statistics import SUCCESS_ACCURACY, success_rate

LEARNED_FACT = f"seeds that reach {SUCCESS_ACCURACY:.0%}"
LEARNED_SHARE = 0.5
"""An arm has learned if at least this share of its seeds reaches SUCCESS."""


def measured_confounds(results: GridResults, rows: Sequence[ArmRow]) -> Confounds:
    """The confounds of all arms that have a cell with a config in its folder."""
    sides: dict[str, ComparedArm] = {}
    for cell in results.cells:
        if cell.arm not in sides and (results.root / cell.path / CONFIG).is_file():
            solved = frozenset(cell.matched.get("solved", {}))
            sides[cell.arm] = ComparedArm(cell.options, results.config(cell), solved)
    measured = {row.arm: row.cells[0].metrics for row in rows if row.cells}
    figures = {
        arm: {n: found[n] for n in SIZE_NAMES if n in found} for arm, found in measured.items()
    }
    scores = {row.arm: row.scores for row in rows if row.scores and is_accuracy(row.headline)}
    learned = {arm: success_rate(values) for arm, values in scores.items()}
    for arm, share in learned.items():
        figures[arm][LEARNED_FACT] = f"{share * len(scores[arm]):.0f}/{len(scores[arm])}"
    pairs = compared_pairs(results.report, results.claims, results.arms)
    matched = results.fields.match is not None
    found = find_confounds(sides, pairs, results.axes, results.tuning, figures, matched)
    found.warnings.extend(_unlearned(pairs, learned, results.windows))
    return found


def _unlearned(
    pairs: Sequence[ArmPair], learned: Mapping[str, float], windows: Sequence[str]
) -> list[str]:
    """A line that names arms that did not learn and are compared with arms that did."""
    arms: dict[str, None] = {}
    for pair in pairs:
        if not all(arm in learned for arm in pair):
            continue
        low, high = sorted(pair, key=lambda arm: learned[arm])
        if learned[low] < LEARNED_SHARE <= learned[high] and low not in windows:
            arms[low] = None
    if not arms:
        return []
    more = f" and {len(arms) - NAMED_AT_MOST} more" if len(arms) > NAMED_AT_MOST else ""
    return [
        f"{'; '.join([*arms][:NAMED_AT_MOST])}{more}: under half of the seeds reach "
        f"{SUCCESS_ACCURACY:.0%}, and at least half do in arms that are compared with them, "
        f"so that the difference may be one of learning and not of what the rule can hold; give more updates, another learning rate or "
        f"norm before you call an arm unable"
    ]
