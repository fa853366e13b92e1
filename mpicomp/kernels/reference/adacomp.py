"""AdaComp's selection bin by bin, and its entries of 8 or 16 bits, in NumPy."""

import numpy as np

from mpicomp.errors import PacketError
from mpicomp.kernels.reference.sums import finite, total


def adacomp_width(size):
    """The bytes of an entry: 1 for bins of up to 64 elements, 2 for larger ones."""
    return 1 if size <= 64 else 2


def adacomp_select(g, grad, factor, size):
    """(indices sent, scale) of one layer, cut into bins of `size` elements.

    h = g + (factor - 1) * grad; sent is what has |h| >= gmax of its bin, gmax = max |g| > 0, and
    g != 0. scale = sum of gmax (`sums.total`) / number of bins, the empty ones included.
    """
    if g.size == 0:
        return np.zeros(0, np.int64), np.float32(0)
    h = np.float32(factor - 1) * grad + g
    gmax = np.maximum.reduceat(np.abs(g), np.arange(0, g.size, size))
    each = np.repeat(gmax, size)[:g.size]
    sent = np.flatnonzero((np.abs(h) >= each) & (each > 0) & (g != 0))
    return sent, total(gmax) / np.float32(gmax.size)


def adacomp_encode(g, grad, factor, size, data):
    """Write the entries of one layer; returns (how many, scale).

    An entry of B bits (B = 8 * adacomp_width) is field << 2 | last << 1 | positive:
        field < size              element `field` of the current bin; last = 1 on the bin's last one
        field >= size - 1, bits 0  a run of field - size + 2 bins in which nothing is sent
    The two cannot be confused: a bin's last place, size - 1, is always the last one sent. A run
    longer than an entry can say takes several, filled from the first on. Empty bins after the
    last entry are not said.
    """
    sent, scale = adacomp_select(g, grad, factor, size)
    if sent.size == 0:
        return 0, scale
    kind = np.uint8 if adacomp_width(size) == 1 else np.uint16
    most = (1 << 8 * adacomp_width(size) - 2) - (size - 1)
    bins, place = sent // size, sent % size
    empty = np.maximum(np.diff(bins, prepend=-1) - 1, 0)  # bins passed over before each one sent
    last = np.append(bins[1:] != bins[:-1], True)
    runs = -(-empty // most)
    at = np.arange(sent.size) + np.cumsum(runs)
    entries = np.full(at[-1] + 1, size - 2 + most << 2, kind)
    rest = runs > 0
    entries[at[rest] - 1] = size - 2 + empty[rest] - (runs[rest] - 1) * most << 2
    entries[at] = place << 2 | last << 1 | (g[sent] > 0)
    data[:entries.nbytes].view(kind)[:] = entries
    return entries.size, scale


def adacomp_decode_add(data, scale, size, weight, out):
    """out += +-(weight * scale) at the elements that the entries name."""
    entries = data.view(np.uint8 if adacomp_width(size) == 1 else np.uint16).astype(np.int64)
    if entries.size == 0:
        return
    field, last, positive = entries >> 2, entries >> 1 & 1, entries & 1
    skip = (last == 0) & (field >= size - 1)
    step = np.where(skip, field - size + 2, last)
    index = ((np.cumsum(step) - step) * size + field)[~skip]
    wrong = (not last[-1] or (skip & (positive == 1)).any() or (field[~skip] >= size).any()
             or (np.diff(index) <= 0).any() or index[-1] >= out.size)
    if wrong:
        raise PacketError(f"adacomp: entries must ascend, stay below {out.size} and end with the "
                          "last one of a bin")
    quantum = np.float32(weight) * np.float32(scale)
    if not finite(quantum):
        raise PacketError("adacomp: the scale in the payload is not finite")
    out[index] += np.where(positive[~skip] == 1, quantum, -quantum)
