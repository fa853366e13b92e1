"""The elements of largest magnitude, exactly so many, in NumPy."""

import numpy as np


def topk_keeps(size, density) -> int:
    """max(1, round(density * size)), a half to the even number; 0 of none."""
    return min(max(1, round(density * size)), size)


def topk_select(x, keep, start, data):
    """int32 start + i of the `keep` largest |x[i]| at the front of `data`, ascending.

    Of equal magnitudes those of lower index are taken.
    """
    order = np.argsort(-np.abs(x), kind="stable")[:keep]
    data[:4 * keep].view(np.int32)[:] = np.sort(order) + start
