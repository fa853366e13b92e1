"""Dryden's thresholds and words of version 2016, compiled."""

from ctypes import c_int64

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import (
    Unfit,
    at,
    floats,
    lib,
    or_reference,
    philox_key,
    refused,
    some_payloads,
)


def _draws(sample, rows):
    """The number of draws from each column; 0 where all rows are looked at."""
    return sample if 0 < sample < rows else 0


def _room(data, rows, columns):
    return at(data, np.uint8, 4 + 8 * columns + 4 * rows * columns, True)


@or_reference
def dryden_columns(x, rows, columns, proportion, sample, key, start):
    lower, upper = np.empty(columns, np.float32), np.empty(columns, np.float32)
    lib.mp_dryden_columns(floats(x, rows * columns), None, rows, columns, proportion,
                          _draws(sample, rows), *philox_key(key), start, lower.ctypes.data,
                          upper.ctypes.data)
    return lower, upper


@or_reference
def dryden_encode_2016(x, rows, columns, lower, upper, data):
    return lib.mp_dryden_encode(floats(x, rows * columns), None, None, rows, columns,
                                floats(lower, columns), floats(upper, columns),
                                _room(data, rows, columns))


def dryden_encode_owed_2016(grad, owed, out, matrices, proportion, sample, key, data):
    """Encode all matrices of owed + grad, (start, rows, columns); what is left goes to `out`.

    Returns the bytes used.
    """
    used = 0
    for start, rows, columns in matrices:
        n = rows * columns
        part, room = slice(start, start + n), data[used:used + 4 + 8 * columns + 4 * n]
        result = lib.mp_dryden_encode_owed(
            floats(owed[part], n), floats(grad[part], n), floats(out[part], n, True), rows, columns,
            proportion, _draws(sample, rows), *philox_key(key), start, _room(room, rows, columns))
        used += refused(result, reference.dryden_decode_add_2016, room, rows, columns, -1.0,
                        out[part])
    return used


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


def dryden_decode_sum_2016(payloads, matrices, weight, out, fresh=True):
    """out = the sum over the payloads in their order; returns the bytes that each of them needs.

    Not `fresh`: what is in `out` stays in the sum.
    """
    used = [0] * len(payloads)
    for start, rows, columns in matrices:
        sizes = _matrix_sum([data[n:] for data, n in zip(payloads, used)], rows, columns, weight,
                            out[start:start + rows * columns], fresh)
        used = [n + size for n, size in zip(used, sizes)]
    return used


def _matrix_sum(payloads, rows, columns, weight, out, fresh):
    """The bytes of this matrix in each."""
    try:
        sizes = _dryden_decode(payloads, rows, columns, weight, out, fresh) if payloads else None
    except Unfit:
        sizes = None
    if sizes is None:
        if fresh:
            out[...] = 0
        sizes = [reference.dryden_decode_add_2016(data, rows, columns, weight, out)
                 for data in payloads]
    return sizes
