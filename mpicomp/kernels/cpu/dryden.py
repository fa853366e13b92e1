"""Dryden's thresholds and words of version 2016, compiled."""

from ctypes import c_int64

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import (Unfit, at, floats, lib, or_reference, philox_key,
                                         refused, some_payloads)


def _dryden_columns(base, grad, rows, columns, proportion, sample, key, start):
    lower, upper = np.empty(columns, np.float32), np.empty(columns, np.float32)
    sample = sample if 0 < sample < rows else 0
    lib.mp_dryden_columns(floats(base, rows * columns), grad, rows, columns, proportion, sample,
                          *philox_key(key), start, lower.ctypes.data, upper.ctypes.data)
    return lower, upper


@or_reference
def dryden_columns(x, rows, columns, proportion, sample, key, start):
    return _dryden_columns(x, None, rows, columns, proportion, sample, key, start)


def _dryden_encode(base, grad, out, rows, columns, lower, upper, data):
    room = 4 + 8 * columns + 4 * rows * columns
    return lib.mp_dryden_encode(floats(base, rows * columns), grad, out, rows, columns,
                                floats(lower, columns), floats(upper, columns),
                                at(data, np.uint8, room, True))


@or_reference
def dryden_encode_2016(x, rows, columns, lower, upper, data):
    return _dryden_encode(x, None, None, rows, columns, lower, upper, data)


def dryden_encode_owed_2016(grad, owed, out, rows, columns, proportion, sample, key, start, data):
    """Thresholds and `dryden_encode_2016` of owed + grad; what is then still owed goes to `out`."""
    n = rows * columns
    more = floats(grad, n)
    lower, upper = _dryden_columns(owed, more, rows, columns, proportion, sample, key, start)
    result = _dryden_encode(owed, more, floats(out, n, True), rows, columns, lower, upper, data)
    return refused(result, reference.dryden_decode_add_2016, data, rows, columns, -1.0, out)


def _dryden_decode(payloads, rows, columns, weight, out, fresh):
    """Bytes of each packet; None where one is too short or the compiled function refuses it."""
    head, sizes = 4 + 8 * columns, []
    for data in payloads:
        if data.size < head:
            return None
        sizes.append(head + 4 * int(data[:4].view(np.uint32)[0]))
        if data.size < sizes[-1]:
            return None
    addresses, _ = some_payloads(payloads, 1)
    result = lib.mp_dryden_decode(addresses, (c_int64 * len(sizes))(*sizes), len(payloads),
                                  out.size, columns, weight, floats(out, rows * columns, True),
                                  fresh)
    return None if result < 0 else sizes


@or_reference
def dryden_decode_add_2016(data, rows, columns, weight, out):
    sizes = _dryden_decode([data], rows, columns, weight, out, False)
    if sizes is None:
        raise Unfit()
    return sizes[0]


def dryden_decode_sum_2016(payloads, rows, columns, weight, out):
    """out = the sum over the payloads in their order; returns the bytes of this matrix in each."""
    try:
        sizes = _dryden_decode(payloads, rows, columns, weight, out, True) if payloads else None
    except Unfit:
        sizes = None
    if sizes is None:
        out[...] = 0
        sizes = [reference.dryden_decode_add_2016(data, rows, columns, weight, out)
                 for data in payloads]
    return sizes
