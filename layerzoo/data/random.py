"""Counter-based random integers: a sample is a pure function of its keys, on any machine.

Integers only, so that every machine draws the same; vectorised, so that no sample needs a
generator of its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

U64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: U64) -> U64:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection of 64-bit integers."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def bits(*keys: ArrayLike) -> U64:
    """64 random bits for each combination of keys, non-negative integers that broadcast."""
    hashed = np.zeros(1, np.uint64)
    for key in keys:
        key = np.atleast_1d(np.asarray(key)).astype(np.uint64)
        hashed = _mix((hashed ^ key) + _GOLDEN)
    return hashed


def below(n: ArrayLike, random: U64) -> NDArray[np.int64]:
    """Random bits as numbers in range(n); n may be an array that broadcasts."""
    return (random % np.asarray(n).astype(np.uint64)).astype(np.int64)


def choose(population: int, draws: int, random: U64) -> NDArray[np.int64]:
    """Draw without replacement from range(population): `[B, draws]` bits -> `[B, draws]`."""
    rows = np.arange(len(random))
    pool = np.broadcast_to(np.arange(population), (len(random), population)).copy()
    for n in range(draws):  # the head of a Fisher-Yates shuffle
        other = n + below(population - n, random[:, n])
        pool[rows, other], pool[:, n] = pool[:, n].copy(), pool[rows, other]
    return pool[:, :draws]


def choose_weighted(weights: NDArray[np.int64], draws: int, random: U64) -> NDArray[np.int64]:
    """Draw indices without replacement, one after another, each with probability proportional to
    its integer weight among those left: `[B, draws]` bits -> `[B, draws]`, in order of drawing."""
    rows = np.arange(len(random))
    left = np.broadcast_to(weights, (len(random), len(weights))).copy()
    drawn = np.empty((len(random), draws), np.int64)
    for n in range(draws):
        edges = left.cumsum(1)
        point = (random[:, n] % edges[:, -1].astype(np.uint64)).astype(np.int64)
        drawn[:, n] = (edges > point[:, None]).argmax(1)
        left[rows, drawn[:, n]] = 0
    return drawn


def shuffle(random: U64) -> NDArray[np.int64]:
    """A permutation of each row: `[B, n]` bits -> `[B, n]`."""
    return np.argsort(random, axis=1, kind="stable")


def slot_weights(slots: int, alpha: float) -> NDArray[np.int64]:
    """Weights for `choose_weighted`: slot i = 1, 2, .. with probability ~ i^(alpha - 1). Integers,
    so that a rounding of the power cannot change a draw elsewhere."""
    at = np.arange(1, slots + 1, dtype=np.float64)
    return np.rint(2.0**32 * at ** (alpha - 1)).astype(np.int64)
