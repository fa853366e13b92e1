"""Dryden's thresholds, means and words (version 2016), on the device."""

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.gpu import device
from mpicomp.kernels.gpu.arguments import (Unfit, checked, floats, new_fault, or_host, payload,
                                           philox_key, refusal, refusals, room)
from mpicomp.kernels.gpu.sums import finite_fault, fold, host
from mpicomp.kernels.gpu.tiles import compact, gather


def _dryden_columns(x, more, rows, columns, proportion, sample, key, start):
    d = device.current()
    lower, upper = d.empty(columns, np.float32), d.empty(columns, np.float32)
    d.launch("dryden_columns", columns * device.THREADS, x, more, rows, columns, proportion,
             sample if 0 < sample < rows else 0, *philox_key(key), start, lower, upper)
    return lower, upper


@or_host
def dryden_columns(x, rows, columns, proportion, sample, key, start):
    return _dryden_columns(floats(x, rows * columns), None, rows, columns, proportion, sample, key,
                           start)


def _dryden_encode(x, more, out, rows, columns, lower, upper, data, fault):
    d, n, head, blocks = device.current(), rows * columns, 4 + 8 * columns, -(-rows // 32)
    sums = d.empty(2 * blocks * columns, np.float32)
    counts = d.empty(2 * blocks * columns, np.uint32)
    d.launch("dryden_sums", blocks * columns, x, more, rows, columns, lower, upper, sums, counts)
    with room(data, 4, head + 4 * n) as packet:
        means = packet[4:head]
        d.launch("dryden_means", 2 * columns, fold(sums, 2, blocks, columns),
                 fold(counts, 2, blocks, columns), columns, means, fault)

        def select(words, tiles):
            d.launch("dryden_select", tiles.size * device.THREADS, x, more, out, n, columns, lower,
                     upper, means, words, tiles)

        words, tiles, total = compact(n, select)
        gather(words, tiles, total, packet[head:])
        d.launch("write_count", 1, total, packet)
    return head + 4 * int(host(total)[0])


@or_host
def dryden_encode_2016(x, rows, columns, lower, upper, data):
    return _dryden_encode(floats(x, rows * columns), None, None, rows, columns,
                          floats(lower, columns), floats(upper, columns), data, new_fault())


def dryden_encode_owed_2016(grad, owed, out, rows, columns, proportion, sample, key, start, data):
    """Thresholds and `dryden_encode_2016` of owed + grad; what is then still owed goes to `out`."""
    n, fault = rows * columns, new_fault()
    owed, grad = floats(owed, n), floats(grad, n)
    cuts = _dryden_columns(owed, grad, rows, columns, proportion, sample, key, start)
    used = _dryden_encode(owed, grad, floats(out, n), rows, columns, *cuts, data, fault)
    checked(fault, refusal(reference.dryden_decode_add_2016, data[:used], rows, columns, -1.0, out))
    return used


def _dryden_add(data, rows, columns, weight, out, fault):
    """Adds one packet; returns the bytes of this matrix in it."""
    head = 4 + 8 * columns
    if data.size < head:
        raise Unfit()
    end = head + 4 * int(host(data[:4]).view(np.uint32)[0])
    if data.size < end:
        raise Unfit()
    packet = payload(data[:end], 4)
    means, words = packet[4:head], packet[head:]
    finite_fault(means.view(np.float32), fault)
    device.current().launch("words_add_means", words.size // 4, words, words.size // 4, means,
                            columns, weight, out, rows * columns, fault)
    return end


@or_host
def dryden_decode_add_2016(data, rows, columns, weight, out):
    fault = new_fault()
    end = _dryden_add(data, rows, columns, weight, floats(out, rows * columns), fault)
    checked(fault, refusal(reference.dryden_decode_add_2016, data, rows, columns, weight, out))
    return end


def dryden_decode_sum_2016(payloads, rows, columns, weight, out):
    """out = the sum over the payloads in their order; returns the bytes of this matrix in each."""
    def decode_add(_, data, out):
        reference.dryden_decode_add_2016(data, rows, columns, weight, out)

    fault, sizes = new_fault(), []
    complain = refusals(decode_add, payloads, out)
    out[...] = 0
    for data in payloads:
        try:
            sizes.append(_dryden_add(data, rows, columns, weight, floats(out), fault))
        except Unfit:
            complain()  # too short
            raise
    checked(fault, complain)
    return sizes
