"""Covering arrays: a few combinations of options in which every two values meet."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
"""A value for every field."""

CANDIDATES = 512
"""Rows that are drawn where there are too many to try them all."""
CHANGED = 128
"""Rows in which a pair is put that none of them has."""


def covering(
    fields: Mapping[str, Sequence[Any]], accepts: Callable[[Row], bool] = lambda row: True
) -> tuple[list[Row], list[Row]]:
    """Few rows that `accepts` takes, such that every pair of values of every two fields is in one
    of them; and the pairs that are in no such row. The same for the same fields.

    Greedy: the next row is, of the candidates, the one with the most pairs that are not covered
    yet. Of a single field the pairs are its values.
    """
    width, places = min(2, len(fields)), [range(len(values)) for values in fields.values()]
    together = itertools.combinations(
        [[(n, i) for i in place] for n, place in enumerate(places)], width
    )
    pairs = [pair for columns in together for pair in itertools.product(*columns)]
    bits = {pair: 1 << n for n, pair in enumerate(pairs)}
    pool: dict[tuple[int, ...], int] = {}  # rows, as places of their values, and their pairs

    def read(chosen: Iterable[tuple[int, int]]) -> Row:
        names = list(fields)
        return {names[n]: fields[names[n]][i] for n, i in chosen}

    def add(row: tuple[int, ...]) -> None:
        if row not in pool and accepts(read(enumerate(row))):
            pool[row] = sum(bits[pair] for pair in itertools.combinations(enumerate(row), width))

    draw, some = random.Random(0), math.prod(map(len, places)) > CANDIDATES
    drawn = (tuple(map(draw.choice, places)) for _ in range(CANDIDATES))
    for row in drawn if some else itertools.product(*places):
        add(row)
    for pair in pairs if some else ():  # what is rare among the candidates
        if not any(found & bits[pair] for found in pool.values()):
            for row in list(pool)[:CHANGED]:
                add(tuple({**dict(enumerate(row)), **dict(pair)}.values()))

    rows, missing = [], sum(bits.values())
    reached = functools.reduce(operator.or_, pool.values(), 0)
    while missing & reached:
        best = max(pool, key=lambda row: (pool[row] & missing).bit_count())
        rows.append(read(enumerate(best)))
        missing &= ~pool[best]
    return rows, [read(pair) for pair in pairs if missing & bits[pair]]
