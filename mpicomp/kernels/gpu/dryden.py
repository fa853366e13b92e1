"""Dryden's thresholds, means and words (version 2016), on the device."""

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.gpu import device
from mpicomp.kernels.gpu.arguments import (
    Unfit,
    checked,
    constants,
    floats,
    new_fault,
    on_host,
    or_host,
    payload,
    philox_key,
    refusal,
    refusals,
    room,
    table,
)
from mpicomp.kernels.gpu.sums import finite_fault, fold, host
from mpicomp.kernels.gpu.tiles import compact


def _dryden_columns(x, more, rows, columns, proportion, sample, key, start):
    d = device.current()
    lower, upper = d.empty(columns, np.float32), d.empty(columns, np.float32)
    d.launch("dryden_columns", columns * device.THREADS, x, more, rows, columns, proportion,
             sample if 0 < sample < rows else 0, *philox_key(key), start, lower, upper)
    return lower, upper


@or_host(reference.dryden_columns)
def dryden_columns(x, rows, columns, proportion, sample, key, start):
    return _dryden_columns(floats(x, rows * columns), None, rows, columns, proportion, sample, key,
                           start)


def _dryden_encode(x, more, out, rows, columns, lower, upper, packet, place, fault):
    """Write one matrix at word place[0] of the packet, and to place[1] where the next begins."""
    d, n, blocks = device.current(), rows * columns, -(-rows // 32)
    sums = d.empty(2 * blocks * columns, np.float32)
    counts = d.empty(2 * blocks * columns, np.uint32)
    d.launch("dryden_sums", blocks * columns, x, more, rows, columns, lower, upper, sums, counts)
    means = d.empty(2 * columns, np.float32)
    d.launch("dryden_means", 2 * columns, fold(sums, 2, blocks, columns),
             fold(counts, 2, blocks, columns), columns, means, fault)

    def select(words, tiles):
        d.launch("dryden_select", tiles.size * device.THREADS, x, more, out, n, columns, lower,
                 upper, means, words, tiles)

    words, tiles, total = compact(n, select)
    d.launch("dryden_put", tiles.size * device.THREADS, words, tiles, tiles.size, total, means,
             columns, place, packet)


@or_host(reference.dryden_encode_2016)
def dryden_encode_2016(x, rows, columns, lower, upper, data):
    n, place = rows * columns, device.current().zeros(2, np.int64)
    with room(data, 4, 4 + 8 * columns + 4 * n) as packet:
        _dryden_encode(floats(x, n), None, None, rows, columns, floats(lower, columns),
                       floats(upper, columns), packet, place, new_fault())
    return 4 * int(host(place)[1])


def dryden_encode_owed_2016(grad, owed, out, matrices, proportion, sample, key, data):
    """Encode all matrices of owed + grad, (start, rows, columns); what is left goes to `out`.

    Returns the bytes used, the only thing that is read back, once for all matrices.
    """
    fault, places = new_fault(), device.current().zeros(len(matrices) + 1, np.int64)
    floats(grad), floats(owed, grad.size), floats(out, grad.size)
    most = sum(4 + 8 * columns + 4 * rows * columns for _, rows, columns in matrices)
    with room(data, 4, most) as packet:
        for t, (start, rows, columns) in enumerate(matrices):
            part = slice(start, start + rows * columns)
            cuts = _dryden_columns(owed[part], grad[part], rows, columns, proportion, sample, key,
                                   start)
            _dryden_encode(owed[part], grad[part], out[part], rows, columns, *cuts, packet,
                           places[t:t + 2], fault)
    used = 4 * int(host(places[len(matrices):])[0])
    checked(fault, refusal(_add_on_host, data[:used], matrices, -1.0, out))
    return used


def _add_on_host(data, matrices, weight, out):
    """The reference's refusal of what is wrong with a packet, if anything is; its bytes."""
    used = 0
    for start, rows, columns in matrices:
        used += reference.dryden_decode_add_2016(data[used:], rows, columns, weight,
                                                 out[start:start + rows * columns])
    return used


def _begins(payloads, matrices):
    """int64[packets, matrices + 1]: the words at which each matrix begins in each packet.

    -1 from where a packet is too short. The last is the end. One copy to the host for all.
    """
    d, count = device.current(), len(matrices)
    places = d.empty(len(payloads) * (count + 1), np.int64)
    d.launch("dryden_walk", len(payloads), table(payloads),
             d.array(np.array([p.size // 4 for p in payloads], np.int64)), len(payloads),
             constants(np.array([columns for *_, columns in matrices], np.int64)), count, places)
    return host(places).reshape(len(payloads), count + 1)


def _dryden_add(packet, begin, end, rows, columns, weight, out, fault):
    """Add the matrix that words begin ... end of a packet tell."""
    means = packet[4 * begin + 4:4 * (begin + 1 + 2 * columns)]
    words = packet[4 * (begin + 1 + 2 * columns):4 * end]
    finite_fault(means.view(np.float32), fault)
    device.current().launch("words_add_means", words.size // 4, words, words.size // 4, means,
                            columns, weight, out, rows * columns, fault)


@or_host(reference.dryden_decode_add_2016)
def dryden_decode_add_2016(data, rows, columns, weight, out):
    fault, packet = new_fault(), payload(data[:data.size // 4 * 4], 4)
    begin, end = map(int, _begins([packet], [(0, rows, columns)])[0])
    if end < 0:
        raise Unfit()
    _dryden_add(packet, begin, end, rows, columns, weight, floats(out, rows * columns), fault)
    checked(fault, refusal(reference.dryden_decode_add_2016, data, rows, columns, weight, out))
    return 4 * end


def dryden_decode_sum_2016(payloads, matrices, weight, out, fresh=True):
    """out = the sum over the payloads in their order; returns the bytes that each of them needs.

    Not `fresh`: what is in `out` stays in the sum.
    """
    fault = new_fault()
    complain = refusals(lambda _, data, out: _add_on_host(data, matrices, weight, out), payloads,
                        floats(out))
    if fresh:
        out[...] = 0
    packets = [payload(data[:data.size // 4 * 4], 4) for data in payloads]
    places = _begins(packets, matrices)
    if (places < 0).any():
        complain()
    for packet, begins in zip(packets, places.tolist()):
        for t, (start, rows, columns) in enumerate(matrices):
            _dryden_add(packet, begins[t], begins[t + 1], rows, columns, weight,
                        out[start:start + rows * columns], fault)
    checked(fault, complain)
    return [4 * begins[-1] for begins in places.tolist()]


dryden_matrix = on_host(reference.dryden_matrix)
dryden_encode_2017 = on_host(reference.dryden_encode_2017)
dryden_decode_add_2017 = on_host(reference.dryden_decode_add_2017)
