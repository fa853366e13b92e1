"""CNTK's forms of 1-bit SGD: its wire, the threshold at the mean, 2, 4 or 8 bits; in NumPy."""

import numpy as np

from mpicomp.errors import PacketError
from mpicomp.kernels.reference.onebit import onebit_means, onebit_words
from mpicomp.kernels.reference.sums import finite, fold

CLOSE = np.float32(1e-36)  # a range that is smaller than this is a single value


def onebit_encode_cntk(x, rows, columns, data):
    """`onebit_encode` in CNTK's layout: a column after the other.

    Each column is float32 lower, upper, uint32 words[W]:
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


def onebit_decode_sum_cntk(payloads, rows, columns, weight, out):
    """out = the sum of weight * the level of each bit, over the payloads in their order."""
    out[...] = 0
    for data in payloads:
        onebit_decode_add_cntk(data, rows, columns, weight, out)


def onebit_mean_bits(v):
    """(bits, mean, dev) of each column: bit = v >= mean, dev = the mean of |v - mean|.

    The two levels mean -+ dev are tied to the mean. Sums follow `sums.fold`, in float32.
    """
    rows = np.float32(v.shape[0])
    mean = fold(v) / rows
    return v >= mean, mean, fold(np.abs(v - mean)) / rows


def onebit_codes(v, bits):
    """(codes, lower, upper): v in 2**bits - 1 equal steps between -+ 4 standard deviations.

    The deviation is about 0, in float64 from the sum of v * v (CNTK's float32 squares underflow
    below 1e-22, and it then says 0). The number of steps is odd, so that
    the middle one stands for 0; what is at `upper` or beyond gets a code of its own above them.
    In float32: code = (v - lower) * (steps / (upper - lower)), truncated; 0 up to `lower`. What is
    no number in an infinite range, which decoding refuses, has the code 0.
    """
    wide = v.astype(np.float64)
    upper = (4 * np.sqrt(fold(wide * wide) / v.shape[0])).astype(np.float32)
    lower = -upper
    width = upper - lower
    steps = np.float32(2**bits - 1)
    single = width < CLOSE
    factor = np.where(single, np.float32(0), steps / np.where(single, np.float32(1), width))
    inside = np.clip(v, lower, upper)
    codes = np.fmax((inside - lower) * factor, np.float32(0)).astype(np.uint32)
    codes[v >= upper] = 2**bits - 1
    codes[v <= lower] = 0
    return codes, lower, upper


def onebit_pack(codes, first, second, bits, wire, data):
    """Two floats a column and the codes, in 32-bit words of 32 / bits codes each, lowest first.

    means: float32 first[columns], second[columns], uint32 words[w][columns], row i in word
    i // (32 / bits). cntk: per column float32 first, second, uint32 words[w], row i in word i % w.
    """
    rows, columns = codes.shape
    count, each = onebit_words(rows, bits), 32 // bits
    padded = np.zeros((count * each, columns), np.uint32)
    padded[:rows] = codes
    place = np.arange(0, 32, bits, dtype=np.uint32)
    if wire == "cntk":
        words = data.view(np.uint32).reshape(columns, 2 + count)
        words[:, 0], words[:, 1] = first.view(np.uint32), second.view(np.uint32)
        words[:, 2:] = np.bitwise_or.reduce(
            padded.reshape(each, count, columns) << place[:, None, None], axis=0).T
        return
    floats = data[:8 * columns].view(np.float32)
    floats[:columns], floats[columns:] = first, second
    data[8 * columns:].view(np.uint32)[:] = np.bitwise_or.reduce(
        padded.reshape(count, each, columns) << place[:, None], axis=1).reshape(-1)


def onebit_unpack(data, rows, columns, bits, wire):
    """(codes[rows, columns], first, second) of what `onebit_pack` wrote."""
    count, each = onebit_words(rows, bits), 32 // bits
    row, mask = np.arange(rows), np.uint32(2**bits - 1)
    if wire == "cntk":
        words = data.view(np.uint32).reshape(columns, 2 + count)
        first, second = (np.ascontiguousarray(words[:, k]).view(np.float32) for k in (0, 1))
        own, place = words[:, 2 + row % count].T, row // count
    else:
        first, second = data[:8 * columns].view(np.float32).reshape(2, columns)
        words = data[8 * columns:].view(np.uint32).reshape(count, columns)
        own, place = words[row // each], row % each
    return own >> (place * bits).astype(np.uint32)[:, None] & mask, first, second


def onebit_encode_mean(x, rows, columns, wire, data):
    """1 bit about the mean. means: the levels mean -+ dev; cntk: the bounds mean -+ 2 dev.

    `onebit_decode_add` and `onebit_decode_add_cntk` read it.
    """
    bits, mean, dev = onebit_mean_bits(x.reshape(rows, columns))
    reach = dev * np.float32(2 if wire == "cntk" else 1)
    onebit_pack(bits, mean - reach, mean + reach, 1, wire, data)


def onebit_encode_bits(x, rows, columns, bits, wire, data):
    """2, 4 or 8 bits an element, by `onebit_codes` and `onebit_pack`."""
    onebit_pack(*onebit_codes(x.reshape(rows, columns), bits), bits, wire, data)


def onebit_decode_add_bits(data, rows, columns, bits, wire, weight, out):
    """out += weight * ((code + 0.5) * ((upper - lower) / steps) + lower); lower if 1e-36 close."""
    codes, lower, upper = onebit_unpack(data, rows, columns, bits, wire)
    with np.errstate(over="ignore", invalid="ignore"):
        width = upper - lower
        step = np.where(width < CLOSE, np.float32(0), width / np.float32(2**bits - 1))
        values = (codes.astype(np.float32) + np.float32(0.5)) * step + lower
        values *= np.float32(weight)
    if not finite(values):
        raise PacketError("onebit: a bound in the payload is not finite, or two are too far apart")
    out += values.reshape(-1)


def onebit_decode_sum_bits(payloads, rows, columns, bits, wire, weight, out):
    """out = the sum of weight * what the codes stand for, over the payloads in their order."""
    out[...] = 0
    for data in payloads:
        onebit_decode_add_bits(data, rows, columns, bits, wire, weight, out)
