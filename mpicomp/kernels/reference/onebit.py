"""1-bit SGD's two means a column and its sign bits, in NumPy."""

import numpy as np

from mpicomp.errors import PacketError
from mpicomp.kernels.reference.sums import finite, fold


def onebit_means(v):
    """(mean of the negative, mean of the non-negative) of each column of v; 0 where there are none.

    Seide 2014, section 3: the two values that minimise the squared error about the threshold 0.
    """
    positive = v >= 0
    count = positive.sum(axis=0, dtype=np.int64)
    zero = np.float32(0)
    upper = fold(np.where(positive, v, zero)) / np.maximum(count, 1).astype(np.float32)
    lower = fold(np.where(positive, zero, v))
    lower /= np.maximum(v.shape[0] - count, 1).astype(np.float32)
    return lower, upper


def onebit_words(rows):
    """The 32-bit words that hold the bits of one column."""
    return -(-rows // 32)


def onebit_encode(x, rows, columns, data):
    """Means and sign bits of a [rows, columns] matrix, word by word across the columns.

    data = float32 lower[columns], float32 upper[columns], uint32 bits[words][columns]; the bit of
    row i, 1 where v >= 0, is bit i % 32 of word i // 32; the bits after the last row are 0.
    """
    v = x.reshape(rows, columns)
    count = onebit_words(rows)
    means = data[:8 * columns].view(np.float32)
    means[:columns], means[columns:] = onebit_means(v)
    bits = np.zeros((32 * count, columns), np.uint32)
    bits[:rows] = v >= 0
    place = np.arange(32, dtype=np.uint32)[None, :, None]
    words = np.bitwise_or.reduce(bits.reshape(count, 32, columns) << place, axis=1)
    data[8 * columns:].view(np.uint32)[:] = words.reshape(-1)


def onebit_decode_add(data, rows, columns, weight, out):
    """out += weight * the mean that the bit stands for."""
    means = data[:8 * columns].view(np.float32).reshape(2, columns)
    if not finite(means):
        raise PacketError("onebit: a mean in the payload is not finite")
    words = data[8 * columns:].view(np.uint32).reshape(onebit_words(rows), columns)
    bits = words[np.arange(rows) // 32] >> (np.arange(rows, dtype=np.uint32) % 32)[:, None] & 1
    weighted = means * np.float32(weight)
    out += np.where(bits == 1, weighted[1], weighted[0]).reshape(-1)


def onebit_encode_cntk(x, rows, columns, data):
    """The same in CNTK's layout: a column after the other, each float lower, upper, uint32 words.

    lower = c - r and upper = c + r about the centre c = (mean0 + mean1) / 2 with the radius
    r = 2 * (mean1 - c); row i is bit i // W of word i % W, where W is the number of words.
    """
    v = x.reshape(rows, columns)
    count = onebit_words(rows)
    mean0, mean1 = onebit_means(v)
    centre = (mean0 + mean1) * np.float32(0.5)
    radius = (mean1 - centre) * np.float32(2)
    bits = np.zeros((32 * count, columns), np.uint32)
    bits[:rows] = v >= 0
    place = np.arange(32, dtype=np.uint32)[:, None, None]
    words = data.view(np.uint32).reshape(columns, 2 + count)
    words[:, 0] = (centre - radius).view(np.uint32)
    words[:, 1] = (centre + radius).view(np.uint32)
    words[:, 2:] = np.bitwise_or.reduce(bits.reshape(32, count, columns) << place, axis=0).T


def onebit_decode_add_cntk(data, rows, columns, weight, out):
    """out += weight * ((bit + 0.5) * (upper - lower) / 2 + lower); lower if 1e-36 close."""
    count = onebit_words(rows)
    words = data.view(np.uint32).reshape(columns, 2 + count)
    lower, upper = (np.ascontiguousarray(words[:, k]).view(np.float32) for k in (0, 1))
    if not (finite(lower) and finite(upper)):
        raise PacketError("onebit: a bound in the payload is not finite")
    with np.errstate(over="ignore", invalid="ignore"):
        half = (upper - lower) * np.float32(0.5)
        same = upper - lower < np.float32(1e-36)
        level = [np.where(same, lower, np.float32(bit + 0.5) * half + lower) * np.float32(weight)
                 for bit in (0, 1)]
    if not (finite(level[0]) and finite(level[1])):
        raise PacketError("onebit: the bounds of a column are too far apart")
    row = np.arange(rows, dtype=np.uint32)
    bits = words[:, 2 + row % count].T >> (row // count)[:, None] & 1
    out += np.where(bits == 1, level[1], level[0]).reshape(-1)
