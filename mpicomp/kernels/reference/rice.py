"""Golomb-Rice coding of index gaps, as Strom's messages may be written, in NumPy."""

import numpy as np

from mpicomp.errors import PacketError
from mpicomp.kernels.reference.strom import strom_sent

LARGEST_PARAMETER = 31


def rice_parameter(total, count) -> int:
    """The bits of a remainder for `count` values of sum `total`: log2 of their mean, rounded down.

    For gaps of randomly chosen elements (a geometric distribution) no other parameter saves more
    than 0.05 bit a value.
    """
    return max((int(total) // count).bit_length() - 1, 0)


def rice_pack(values, k):
    """uint32 words of the stream: per value v >> k ones, a zero, then k remainder bits, low first.

    The first bit of the stream is the lowest of the first word; ones fill up the last word.
    """
    quotient = values >> k
    ends = np.cumsum(quotient + 1 + k)
    zero = ends - 1 - k
    bits = np.ones(int(ends[-1]) + -int(ends[-1]) % 32 if values.size else 0, np.uint8)
    bits[zero] = 0
    for place in range(k):
        bits[zero + 1 + place] = values >> place & 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def rice_unpack(words, k):
    """The values in a stream that `rice_pack` wrote, int64; PacketError for any other."""
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), bitorder="little")
    zeros = np.flatnonzero(bits == 0)
    following = np.searchsorted(zeros, zeros + 1 + k).tolist()  # the first after a remainder
    chain, at = [], 0
    while at < zeros.size:
        chain.append(at)
        at = following[at]
    zero = zeros[chain]
    begins = np.append(0, zero + 1 + k)
    if not 0 <= bits.size - begins[-1] < 32:
        raise PacketError("strom: the coded indices do not end with the payload")
    values = zero - begins[:-1] << k
    for place in range(k):
        values |= bits[zero + 1 + place].astype(np.int64) << place
    return values


def strom_rice_encode(x, tau, strict, data, k=None) -> int:
    """Write what Strom's test sends as gaps; returns the bytes, 0 where nothing is sent.

    data = uint32 parameter, then the words of `rice_pack` of gap << 1 | (x > 0), where the gap is
    the distance to the index sent before, and the index itself at first. The parameter is `k`, or
    what `rice_parameter` makes of the gaps.
    """
    sent = strom_sent(x, tau, strict)
    if sent.size == 0:
        return 0
    values = np.diff(sent, prepend=0) << 1 | (x[sent] > 0)
    if k is None:
        k = rice_parameter(values.sum(), values.size)
    words = rice_pack(values, k)
    data[:4].view(np.uint32)[0] = k
    data[4:4 + words.nbytes].view(np.uint32)[:] = words
    return 4 + words.nbytes


def strom_rice_decode_add(data, tau, weight, out):
    """out += +-(weight * tau) at the indices that the gaps lead to."""
    if data.size == 0:
        return
    words = data.view(np.uint32)
    if words[0] > LARGEST_PARAMETER or words.size < 2:
        raise PacketError(f"strom: a parameter up to {LARGEST_PARAMETER} and then coded indices "
                          f"expected, found {words.size} words that begin with {words[0]}")
    values = rice_unpack(words[1:], int(words[0]))
    gaps = values >> 1
    index = np.cumsum(gaps)
    if index.size == 0 or index.max() >= out.size or (gaps[1:] <= 0).any() or index.min() < 0:
        raise PacketError(f"strom: indices must ascend and stay below {out.size}")
    quantum = np.float32(weight) * np.float32(tau)
    out[index] += np.where(values & 1, quantum, -quantum)
