"""Dryden's thresholds by proportion, the means of what passed them, and its words, in NumPy."""

import numpy as np

from mpicomp import philox
from mpicomp.errors import PacketError
from mpicomp.kernels.reference.sums import finite, fold

NEVER = np.float32(np.inf)  # a threshold that nothing passes


def dryden_draws(key, start, count, n):
    """`count` elements of 0 ... n - 1, with replacement: draw * n / 2**32, rounded down.

    Draw k is the random word of element start + k of the bucket.
    """
    return (philox.words(key, start, count).astype(np.uint64) * np.uint64(n) >> np.uint64(32)
            ).astype(np.int64)


def dryden_columns(x, rows, columns, proportion, sample, key, start):
    """(lower, upper) thresholds of each column, float32[columns]: version 2016.

    Of a column's n+ non-negative values (zeros count) the largest keep = max(1, n+ // proportion)
    set upper, the keep-th of them; of its negative ones in the same way lower. Where a sign is
    absent its threshold is infinite. With `sample` > 0 and more rows than that, this is done on
    `sample` draws from the column; draw k of column j has number j * sample + k.
    """
    v = x.reshape(rows, columns)
    if 0 < sample < rows:
        draws = dryden_draws(key, start, sample * columns, rows).reshape(columns, sample).T
        v = np.take_along_axis(v, draws, axis=0)
    v = np.sort(v, axis=0)
    negative = (v < 0).sum(axis=0)
    positive = v.shape[0] - negative
    column = np.arange(columns)
    last = np.maximum(negative // proportion, 1) - 1
    lower = np.where(negative > 0, v[last, column], -NEVER)
    first = v.shape[0] - np.maximum(positive // proportion, 1)
    upper = np.where(positive > 0, v[first, column], NEVER)
    return lower, upper


def dryden_matrix(x, columns, proportion, sample, key, start):
    """(lower, upper) thresholds, the same for each column: version 2017.

    The keep-th largest magnitude, keep = max(1, n // proportion), decides what is kept; upper is
    the smallest positive and lower the largest negative of these, or the mirror image of the
    other where a sign is absent. Where fewer than that are not zero, all these are kept (LBANN
    keeps none). With 0 < sample < n this is done on `sample` draws.
    """
    v = x[dryden_draws(key, start, sample, x.size)] if 0 < sample < x.size else x
    magnitude = np.abs(v)
    place = v.size - max(1, v.size // proportion)
    cut = np.partition(magnitude, place)[place]
    kept = magnitude >= cut
    positive, negative = v[kept & (v > 0)], v[kept & (v < 0)]
    upper = positive.min() if positive.size else cut
    lower = negative.max() if negative.size else -cut
    return np.full(columns, lower), np.full(columns, upper)


def dryden_kept(v, lower, upper):
    """(sent as negative, sent as positive); a zero is never sent."""
    return (v <= lower) & (v < 0), (v >= upper) & (v > 0)


def dryden_means(v, lower, upper):
    """float32[2, columns]: the mean of what each column sends of either sign; 0 where nothing.

    Sums down the rows follow `sums.fold`, with 0 in the place of what is not sent.
    """
    means = np.zeros((2, v.shape[1]), np.float32)
    for side, kept in enumerate(dryden_kept(v, lower, upper)):
        count = np.maximum(kept.sum(axis=0), 1).astype(np.float32)
        means[side] = fold(np.where(kept, v, np.float32(0))) / count
    return means


def dryden_word(rows):
    """The dtype of a row word of version 2017: row << 1 | sign, and of the counts beside it."""
    return np.dtype(np.uint16 if rows <= 2**15 else np.uint32)


def dryden_encode_2016(x, rows, columns, lower, upper, data) -> int:
    """Write one matrix, return the bytes: uint32 count, means, uint32 index << 1 | positive.

    The index is row * columns + column and ascends.
    """
    v = x.reshape(rows, columns)
    negative, positive = dryden_kept(v, lower, upper)
    sent = np.flatnonzero(negative | positive)
    head = 4 + 8 * columns
    data[:4].view(np.uint32)[0] = sent.size
    data[4:head].view(np.float32)[:] = dryden_means(v, lower, upper).reshape(-1)
    words = sent.astype(np.uint32) << 1 | (x[sent] > 0)
    data[head:head + 4 * sent.size].view(np.uint32)[:] = words
    return head + 4 * sent.size


def dryden_decode_add_2016(data, rows, columns, weight, out) -> int:
    """out += weight * the mean of the word's sign and column; returns the bytes of this matrix."""
    head = 4 + 8 * columns
    if data.size < head:
        raise _short(data, head)
    end = head + 4 * int(data[:4].view(np.uint32)[0])
    if data.size < end:
        raise _short(data, end)
    words = data[head:end].view(np.uint32)
    index = (words >> 1).astype(np.int64)
    if index.size and (index[-1] >= out.size or (np.diff(index) <= 0).any()):
        raise PacketError(f"dryden: indices must ascend and stay below {out.size}")
    means = _means(data[4:head], columns) * np.float32(weight)
    out[index] += means[words & 1, index % columns]
    return end


def dryden_encode_owed_2016(grad, owed, out, matrices, proportion, sample, key, data) -> int:
    """Encode all matrices of owed + grad, (start, rows, columns); what is left goes to `out`.

    Returns the bytes used.
    """
    np.add(owed, grad, out=out)
    used = 0
    for start, rows, columns in matrices:
        part, room = out[start:start + rows * columns], data[used:]
        lower, upper = dryden_columns(part, rows, columns, proportion, sample, key, start)
        used += dryden_encode_2016(part, rows, columns, lower, upper, room)
        dryden_decode_add_2016(room, rows, columns, -1.0, part)
    return used


def dryden_decode_sum_2016(payloads, matrices, weight, out, fresh=True) -> list:
    """out = the sum over the payloads in their order; returns the bytes that each of them needs.

    Not `fresh`: what is in `out` stays in the sum.
    """
    if fresh:
        out[...] = 0
    return [_matrices_add(data, matrices, weight, out) for data in payloads]


def _matrices_add(data, matrices, weight, out):
    used = 0
    for start, rows, columns in matrices:
        part = out[start:start + rows * columns]
        used += dryden_decode_add_2016(data[used:], rows, columns, weight, part)
    return used


def dryden_encode_2017(x, rows, columns, lower, upper, data) -> int:
    """Write one matrix, return the bytes: means, counts, row << 1 | positive column by column.

    Counts and words have 16 bits up to 32768 rows, else 32; 2 bytes of 0 fill up to a multiple of
    4 where needed. Rows ascend within a column.
    """
    v = x.reshape(rows, columns)
    negative, positive = dryden_kept(v, lower, upper)
    kept = (negative | positive).T
    column, row = np.nonzero(kept)
    word = dryden_word(rows)
    head, used = 8 * columns, 8 * columns + word.itemsize * (columns + row.size)
    data[:head].view(np.float32)[:] = dryden_means(v, lower, upper).reshape(-1)
    numbers = data[head:used].view(word)
    numbers[:columns] = kept.sum(axis=1)
    numbers[columns:] = row << 1 | positive[row, column]
    data[used:used + -used % 4] = 0
    return used + -used % 4


def dryden_decode_add_2017(data, rows, columns, weight, out) -> int:
    """out += weight * the mean of the word's sign and column; returns the bytes of this matrix."""
    word = dryden_word(rows)
    head, begin = 8 * columns, (8 + word.itemsize) * columns
    if data.size < begin:
        raise _short(data, begin)
    counts = data[head:begin].view(word).astype(np.int64)
    end = begin + word.itemsize * int(counts.sum())
    if data.size < end + -end % 4:
        raise _short(data, end + -end % 4)
    words = data[begin:end].view(word)
    row, column = (words >> 1).astype(np.int64), np.repeat(np.arange(columns), counts)
    if row.size and (row.max() >= rows or (np.diff(column * rows + row) <= 0).any()):
        raise PacketError(f"dryden: rows must ascend within a column and stay below {rows}")
    if data[end:end + -end % 4].any():
        raise PacketError("dryden: the padding is not 0")
    means = _means(data[:head], columns) * np.float32(weight)
    out[row * columns + column] += means[words & 1, column]
    return end + -end % 4


def _means(data, columns):
    means = data.view(np.float32).reshape(2, columns)
    if not finite(means):
        raise PacketError("dryden: a mean in the payload is not finite")
    return means


def _short(data, expected):
    return PacketError(f"dryden: {expected} bytes expected for a matrix, {data.size} found")
