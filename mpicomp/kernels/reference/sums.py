"""What the kernels of all methods share; `fold` defines the order of every summation."""

from functools import lru_cache

import numpy as np

FOLD = 32  # the width of a block of `fold`


def zeros(size, dtype=np.float32):
    """A new array of zeros."""
    return np.zeros(size, dtype)


def finite(x) -> bool:
    """Is every element finite? (The maximum and the minimum carry a NaN or Inf along.)"""
    return x.size == 0 or bool(np.isfinite(x.max()) and np.isfinite(x.min()))


def within(x, least, most, complain) -> None:
    """complain(x) unless every element is from `least` to `most`; NaN is not."""
    if x.size and not (least <= x.min() and x.max() <= most):
        complain(x)


def copy_finite(x, to) -> bool:
    """Copy x to `to`, both flat; returns whether every element is finite."""
    to[...] = x
    return finite(to)


@lru_cache(maxsize=16)
def sample(n, size, span=None):
    """int64[size]: which of n elements stand for all of them, floor(k * span / size) for each k.

    span = n, the default, spreads them over the whole array. span = size * (n // size) takes every
    (n // size)-th element, as Marian does: of 199,999 elements the first 100,000.
    """
    index = np.arange(size, dtype=np.int64) * (n if span is None else span) // size
    index.flags.writeable = False  # it is kept for the next step
    return index


def fold(a):
    """The sum of `a` over its first axis, in the one order that all backends follow.

    Blocks of 32 consecutive rows are summed one row after the other, starting from zero; the sums
    of the blocks are then summed in the same way, until one row is left. This keeps rounding
    small (three levels for 32768 rows) and suits a vector unit and a warp alike.
    """
    while True:
        blocks = -(-a.shape[0] // FOLD)
        sums = np.zeros((max(blocks, 1), *a.shape[1:]), a.dtype)
        for row in range(min(FOLD, a.shape[0])):
            part = a[row::FOLD]
            sums[:part.shape[0]] += part
        if blocks <= 1:
            return sums[0]
        a = sums


def total(v):
    """The sum of a vector: 32 lanes (element i is in lane i % 32), each folded, then folded."""
    lanes = np.zeros(-(-v.size // FOLD) * FOLD, v.dtype)
    lanes[:v.size] = v
    return fold(fold(lanes.reshape(-1, FOLD)))


def adagrad(x, history, ahead):
    """ahead = history + x * x; x /= sqrt(ahead) + 1e-8, in place (LBANN's form of AdaGrad)."""
    ahead[...] = history + x * x
    x /= np.sqrt(ahead) + np.float32(1e-8)
