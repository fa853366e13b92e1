"""Philox4x32-10: random words as a pure function of (seed, rank, step, bucket, element).

A counter-based generator (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2,
3, SC 2011) has no state to save and does not care in which order, or on which device, the elements
are visited. Element i takes word i % 4 of the block with the counter

    (i // 4, bucket, step, rank)    and the key    (seed mod 2**32, seed div 2**32)

so ranks draw independently, and a step that is repeated draws the same numbers again. What else
must draw independently (a rule's runs, an owner's shards, pulls) has a seed of its own: `part`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Key:
    """What the random numbers of one packet depend on, besides the element."""

    seed: int = 0
    rank: int = 0
    step: int = 0
    bucket: int = 0


def common(key: Key) -> Key:
    """The key of what all ranks draw alike, whichever rank's key is given.

    Its rank is 2^32 - 1, which no rank has: so nothing that a rank draws for itself is like it.
    """
    return replace(key, rank=MASK32)


@lru_cache(maxsize=4096)
def part(seed: int, number: int) -> int:
    """A seed of its own for part `number` (from 0 on) of what draws by `seed`.

    A random function of both, 64 bits wide: so a number of parts, of ranks or of buckets that
    outgrows some field of bits cannot make two of them draw the same.
    """
    counter = number & MASK32, MASK32, number >> 32 & MASK32, MASK32
    low, high, *_ = block(counter, (seed & MASK32, seed >> 32 & MASK32))
    return int(high) << 32 | int(low)


def block(counter: Sequence[Any], key: Sequence[int]) -> tuple[NDArray[np.uint64], ...]:
    """Four uint64 arrays holding 32-bit words: ten rounds over counter (4 words), key (2 words)."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = ((p1 >> _HALF) ^ c1 ^ np.uint64(k0), p1 & _LOW,
                          (p0 >> _HALF) ^ c3 ^ np.uint64(k1), p0 & _LOW)
        k0, k1 = (k0 + _W0) & MASK32, (k1 + _W1) & MASK32
    return c0, c1, c2, c3


def words(key: Key, start: int, count: int) -> NDArray[np.uint32]:
    """The uint32 words of elements start ... start + count - 1."""
    first, last = start // 4, -(-(start + count) // 4)
    index = np.arange(first, last, dtype=np.uint64)
    counter = index, key.bucket & MASK32, key.step & MASK32, key.rank & MASK32
    lanes = block(counter, (key.seed & MASK32, key.seed >> 32 & MASK32))
    flat = np.stack(np.broadcast_arrays(*lanes), axis=-1).astype(np.uint32).reshape(-1)
    return flat[start - 4 * first:][:count]


def uniform(key: Key, start: int, count: int) -> NDArray[np.float32]:
    """float32 in [0, 1) for elements start ... start + count - 1: the top 24 bits of each word."""
    return (words(key, start, count) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
