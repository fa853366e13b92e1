"""Dryden's thresholds and words of version 2016, compiled."""

from ctypes import c_int64

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import (
    Unfit,
    accepted,
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


@or_reference(reference.dryden_columns)
def dryden_columns(x, rows, columns, proportion, sample, key, start):
    lower, upper = np.empty(columns, np.float32), np.empty(columns, np.float32)
    lib.mp_dryden_columns(floats(x, rows * columns), None, rows, columns, proportion,
                          _draws(sample, rows), *philox_key(key), start, lower.ctypes.data,
                          upper.ctypes.data)
    return lower, upper


@or_reference(reference.dryden_encode_2016)
def dryden_encode_2016(x, rows, columns, lower, upper, data):
    return lib.mp_dryden_encode(floats(x, rows * columns), None, None, rows, columns,
                                floats(lower, columns), floats(upper, columns),
                                _room(data, rows, columns))


@or_reference(reference.dryden_encode_owed_2016)
def dryden_encode_owed_2016(grad, owed, out, matrices, proportion, sample, key, data):
    n, used = grad.size, 0
    most = sum(4 + 8 * columns + 4 * rows * columns for _, rows, columns in matrices)
    addresses = floats(owed, n), floats(grad, n), floats(out, n, True)
    packet, words = at(data, np.uint8, most, True), philox_key(key)
    for start, rows, columns in matrices:
        have, more, rest = (address + 4 * start for address in addresses)
        size = lib.mp_dryden_encode_owed(have, more, rest, rows, columns, proportion,
                                         _draws(sample, rows), *words, start, packet + used)
        if size < 0:
            refused(size, reference.dryden_decode_add_2016, data[used:], rows, columns, -1.0,
                    out[start:start + rows * columns])
        used += size
    return used


def _dryden_decode(payloads, rows, columns, weight, out, fresh):
    """Bytes of each packet. Raises Unfit where one is too short, or the compiled function refuses.
    """
    head, sizes = 4 + 8 * columns, []
    for data in payloads:
        if data.size < head:
            raise Unfit()
        sizes.append(head + 4 * int(data[:4].view(np.uint32)[0]))
        if data.size < sizes[-1]:
            raise Unfit()
    addresses, _ = some_payloads(payloads, 1)
    accepted(lib.mp_dryden_decode(addresses, (c_int64 * len(sizes))(*sizes), len(payloads),
                                  out.size, columns, weight, floats(out, rows * columns, True),
                                  fresh))
    return sizes


@or_reference(reference.dryden_decode_add_2016)
def dryden_decode_add_2016(data, rows, columns, weight, out):
    return _dryden_decode([data], rows, columns, weight, out, False)[0]


def dryden_decode_sum_2016(payloads, matrices, weight, out, fresh=True):
    """The reference's, matrix by matrix compiled."""
    used = [0] * len(payloads)
    for start, rows, columns in matrices:
        parts, to = [data[n:] for data, n in zip(payloads, used)], out[start:start + rows * columns]
        try:
            sizes = _dryden_decode(parts, rows, columns, weight, to, fresh)
        except Unfit:
            sizes = reference.dryden_decode_sum_2016(parts, [(0, rows, columns)], weight, to, fresh)
        used = [n + size for n, size in zip(used, sizes)]
    return used
