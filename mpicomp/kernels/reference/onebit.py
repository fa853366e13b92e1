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


def onebit_words(rows, bits=1):
    """The 32-bit words that hold the codes of one column."""
    return -(-rows * bits // 32)


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


def onebit_encode_owed(grad, owed, out, rows, columns, data):
    """`onebit_encode` of owed + grad; what is then still owed goes to `out`."""
    np.add(owed, grad, out=out)
    onebit_encode(out, rows, columns, data)
    onebit_decode_add(data, rows, columns, -1.0, out)


def onebit_decode_sum(payloads, rows, columns, weight, out):
    """out = the sum of weight * the mean of each bit, over the payloads in their order."""
    out[...] = 0
    for data in payloads:
        onebit_decode_add(data, rows, columns, weight, out)
