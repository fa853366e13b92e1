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


def adacomp_encode_layers(grad, owed, out, factor, layers, data) -> int:
    """Write a packet of owed + grad, what is then still owed to `out`; returns the bytes used.

    Without a residual owed and out are None. `layers` are (number, segment, bin, bytes of an
    entry) in the order of their entries; see `adacomp_packet`.
    """
    def encode(at, size, room):
        if owed is None:
            return adacomp_encode(grad[at], grad[at], factor, size, room)
        np.add(owed[at], grad[at], out=out[at])
        count, scale = adacomp_encode(out[at], grad[at], factor, size, room)
        if not finite(scale):
            raise PacketError("adacomp: a number in the payload is not finite")
        entries = room[:count * adacomp_width(size)]
        adacomp_decode_add(entries, scale, size, -1.0, out[at])
        return count, scale

    return adacomp_packet(layers, data, encode)


def adacomp_packet(layers, data, encode) -> int:
    """float32 scale[layers], uint32 count[layers], then the entries; returns the bytes used.

    encode(slice, bin, room) writes the entries of a layer to `room`: (how many, scale).
    """
    head, used = 4 * len(layers), 8 * len(layers)
    scales, counts = data[:head].view(np.float32), data[head:used].view(np.uint32)
    for number, segment, size, width in layers:
        room = data[used:used + width * segment.size]
        counts[number], scales[number] = encode(segment.slice, size, room)
        used += width * int(counts[number])
    return used


def adacomp_heads(payloads, size) -> list:
    """The first `size` bytes of each payload, or all that it has, in memory of the host."""
    return [data[:size] for data in payloads]


def adacomp_decode_layers(layers, weight, out):
    """out[at] += +-(weight * scale) at the elements named, packet after packet, in order.

    `layers` are (at, bin, the entries in each packet, the scale in each packet).
    """
    for packet in zip(*[zip(entries, scales) for _, _, entries, scales in layers]):
        for (at, size, *_), (entries, scale) in zip(layers, packet):
            adacomp_decode_add(entries, scale, size, weight, out[at])


def adacomp_decode_sum(layers, weight, out):
    """`adacomp_decode_layers` from zero."""
    out[...] = 0
    adacomp_decode_layers(layers, weight, out)
