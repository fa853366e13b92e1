"""The other quantisers of CNTK's 1-bit SGD: threshold at the mean, and 2, 4 or 8 bits, in NumPy."""

import numpy as np

from mpicomp.errors import PacketError
from mpicomp.kernels.reference.sums import finite, fold

CLOSE = np.float32(1e-36)  # a range that is smaller than this is a single value


def column_words(rows, bits):
    """The 32-bit words that hold the codes of one column."""
    return -(-rows * bits // 32)


def column_mean_bits(v):
    """(bits, mean, dev) of each column: bit = v >= mean, dev = the mean of |v - mean|.

    The two levels mean -+ dev are tied to the mean. Sums follow `sums.fold`, in float32.
    """
    rows = np.float32(v.shape[0])
    mean = fold(v) / rows
    return v >= mean, mean, fold(np.abs(v - mean)) / rows


def column_codes(v, bits):
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


def column_pack(codes, first, second, bits, wire, data):
    """Two floats a column and the codes, in 32-bit words of 32 / bits codes each, lowest first.

    means: float32 first[columns], second[columns], uint32 words[w][columns], row i in word
    i // (32 / bits). cntk: per column float32 first, second, uint32 words[w], row i in word i % w.
    """
    rows, columns = codes.shape
    count, each = column_words(rows, bits), 32 // bits
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


def column_unpack(data, rows, columns, bits, wire):
    """(codes[rows, columns], first, second) of what `column_pack` wrote."""
    count, each = column_words(rows, bits), 32 // bits
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
    bits, mean, dev = column_mean_bits(x.reshape(rows, columns))
    reach = dev * np.float32(2 if wire == "cntk" else 1)
    column_pack(bits, mean - reach, mean + reach, 1, wire, data)


def columns_encode(x, rows, columns, bits, wire, data):
    """2, 4 or 8 bits an element, by `column_codes` and `column_pack`."""
    column_pack(*column_codes(x.reshape(rows, columns), bits), bits, wire, data)


def columns_decode_add(data, rows, columns, bits, wire, weight, out):
    """out += weight * ((code + 0.5) * ((upper - lower) / steps) + lower); lower if 1e-36 close."""
    codes, lower, upper = column_unpack(data, rows, columns, bits, wire)
    with np.errstate(over="ignore", invalid="ignore"):
        width = upper - lower
        step = np.where(width < CLOSE, np.float32(0), width / np.float32(2**bits - 1))
        values = (codes.astype(np.float32) + np.float32(0.5)) * step + lower
        values *= np.float32(weight)
    if not finite(values):
        raise PacketError("onebit: a bound in the payload is not finite, or two are too far apart")
    out += values.reshape(-1)
