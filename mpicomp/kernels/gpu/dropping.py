"""Gradient dropping, on the device."""

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.gpu import device
from mpicomp.kernels.gpu.arguments import (
    anywhere,
    checked,
    constants,
    floats,
    new_fault,
    or_host,
    payload,
    refusal,
    refusals,
    room,
    scalar,
)
from mpicomp.kernels.gpu.sums import SWEEP, finite_fault, fold, host, lanes_of
from mpicomp.kernels.gpu.tiles import TILE, compact, gather, scanned, tiles_of


def _dropping_cut(x, more, rate, draws, first_version=False):
    """The cut as float32[1] on the device."""
    d, n = device.current(), x.size
    cut = d.zeros(1, np.float32)
    if n < 2:
        return cut
    size, span, number = reference.dropping_sample(n, rate, draws, first_version)
    state = d.array(np.array([0, number], np.int64))
    histogram = d.zeros(256, np.uint32)
    for shift in (24, 16, 8, 0):
        d.launch("select_count", min(size, SWEEP), x, more, size, span, state, shift, histogram)
        d.launch("select_digit", device.THREADS, state, shift, histogram, cut)
    return cut


@or_host(reference.dropping_cut)
def dropping_cut(x, rate, draws, first_version=False):
    return _dropping_cut(floats(x), None, rate, draws, first_version)[0]


@or_host(reference.dropping_select)
def dropping_select(x, cut, start, data):
    n, cut = floats(x).size, scalar(cut)
    with room(data, 4, 4 * n) as packet:
        def select(words, counts):
            device.current().launch("dropping_select", counts.size * device.THREADS, x, None, None,
                                    n, cut, start, 0, words, None, counts, None)

        words, counts, total = compact(n, select)
        gather(words, counts, total, packet)
    return int(host(total)[0])


@or_host(reference.dropping_values)
def dropping_values(x, count, data):
    with room(data, 4, 8 * count) as packet:
        device.current().launch("dropping_values", count, floats(x), count, packet)


def dropping_encode_owed(grad, owed, out, scopes, rate, draws, data):
    """Cut, indices and values of owed + grad in one pass; what is then still owed goes to `out`.

    `scopes` are the (start, stop) that have a cut of their own; `data` has 8 * n bytes. Returns
    the bytes used, the only thing that is read back, once for all scopes.
    """
    d, n, fault = device.current(), grad.size, new_fault()
    floats(grad), floats(owed, n), floats(out, n)
    tiles = sum(tiles_of(stop - start) for start, stop in scopes)
    words, values = d.empty(tiles * TILE, np.uint32), d.empty(tiles * TILE, np.float32)
    counts, first = d.empty(tiles, np.int64), 0
    with room(data, 4, 8 * n) as packet:
        for start, stop in scopes:
            x, more, rest = owed[start:stop], grad[start:stop], out[start:stop]
            cut, own = _dropping_cut(x, more, rate, draws), tiles_of(stop - start)
            d.launch("dropping_select", own * device.THREADS, x, more, rest, stop - start, cut,
                     start, first, words, values, counts, fault)
            first += own
        total = scanned(counts)
        d.launch("gather_pairs", tiles * device.THREADS, words, values, counts, tiles, total,
                 packet)
    used = 8 * int(host(total)[0])
    checked(fault, refusal(reference.dropping_decode_add, data[:used], -1.0, out))
    return used


def _dropping_add(data, weight, out, fault):
    words = payload(data, 8 if data.size % 8 else 4)
    count = words.size // 8
    device.current().launch("values_add", count, words[:4 * count], words[4 * count:], count,
                            weight, out, out.size, fault)


@or_host(reference.dropping_decode_add)
def dropping_decode_add(data, weight, out):
    fault = new_fault()
    _dropping_add(data, weight, floats(out), fault)
    checked(fault, refusal(reference.dropping_decode_add, data, weight, out))


def dropping_decode_sum(payloads, weight, out):
    """out = the sum of weight * value at the indices named, over the payloads in their order."""
    fault = new_fault()
    out[...] = 0
    for data in payloads:
        _dropping_add(data, weight, floats(out), fault)
    checked(fault, refusals(lambda _, data, out: reference.dropping_decode_add(data, weight, out),
                            payloads, out))


# ---- survivors=onebit ---------------------------------------------------------------------------


def _dropping_signs(x, cut, start, first, words, counts, means):
    """What one scope leaves in its tiles, from `first` on, of `words` and `counts`; its means."""
    d, own = device.current(), tiles_of(x.size)
    sides = [(d.empty(own * TILE, np.float32), d.empty(own, np.int64)) for _ in range(2)]
    (lower, below), (upper, above) = sides
    d.launch("dropping_signs", own * device.THREADS, x, x.size, cut, start,
             words[first * TILE:(first + own) * TILE], lower, upper, counts[first:first + own],
             below, above)
    found = []
    for values, numbers in sides:  # in order, then zeros, which change no sum that began with +0
        kept, count = d.zeros(max(x.size, 1), np.float32), scanned(numbers)
        gather(values, numbers, count, kept)
        found += fold(lanes_of(kept), 1, 32, 1), count
    d.launch("dropping_means", 2, *found, means)


@or_host(reference.dropping_signs)
def dropping_signs(x, cut, start, means, data):
    d, n, cut = device.current(), floats(x).size, scalar(cut)
    with room(data, 4, 4 * n) as packet:
        words, counts = d.empty(tiles_of(n) * TILE, np.uint32), d.empty(tiles_of(n), np.int64)
        _dropping_signs(x, cut, start, 0, words, counts, floats(means, 2))
        total = scanned(counts)
        gather(words, counts, total, packet)
    return int(host(total)[0])


def dropping_signs_encode(x, scopes, rate, draws, first_version, data):
    """means[scopes][2] and the words of all scopes; returns the bytes used, read back once."""
    d, head = device.current(), 8 * len(scopes)
    tiles = sum(tiles_of(stop - start) for start, stop in scopes)
    words, counts, first = d.empty(tiles * TILE, np.uint32), d.empty(tiles, np.int64), 0
    with room(data, 4, head + 4 * floats(x).size) as packet:
        for number, (start, stop) in enumerate(scopes):
            part, means = x[start:stop], packet[8 * number:8 * number + 8]
            cut = _dropping_cut(part, None, rate, draws, first_version)
            _dropping_signs(part, cut, start, first, words, counts, means)
            first += tiles_of(stop - start)
        total = scanned(counts)
        gather(words, counts, total, packet[head:])
    return head + 4 * int(host(total)[0])


@or_host(reference.dropping_signs_decode_add)
def dropping_signs_decode_add(data, means, starts, weight, out):
    d, fault, words = device.current(), new_fault(), payload(data, 4)
    pairs = floats(anywhere(means), 2 * len(starts))
    finite_fault(pairs, fault)
    d.launch("words_add_scopes", words.size // 4, words, words.size // 4, pairs,
             constants(np.array(starts, np.int64)), len(starts), weight, floats(out), out.size,
             fault)
    checked(fault, refusal(reference.dropping_signs_decode_add, data, means, starts, weight, out))
