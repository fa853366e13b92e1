"""Gradient dropping, compiled."""

import ctypes

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import (
    Unfit,
    at,
    decode_sum,
    floats,
    lib,
    or_reference,
    refused,
    some_payloads,
)


def _drop_cut(grad, owed, rate, draws, first_version=False):
    n = grad.size
    if n < 2:
        return np.float32(0)
    size, span, number = reference.drop_sample(n, rate, draws, first_version)
    return np.float32(lib.mp_drop_cut(floats(grad, n), owed, span, size, number))


@or_reference
def drop_cut(x, rate, draws, first_version=False):
    return _drop_cut(x, None, rate, draws, first_version)


@or_reference
def drop_select(x, cut, start, data):
    return lib.mp_drop_encode(floats(x, x.size), None, None, x.size, cut, start,
                              at(data, np.uint8, 4 * x.size, True), None)


@or_reference
def drop_values(x, count, data):
    if lib.mp_drop_values(floats(x, x.size), x.size, count,
                          at(data, np.uint8, 8 * count, True)) < 0:
        raise Unfit()


def drop_encode_owed(grad, owed, out, scopes, rate, draws, data):
    """Cut, indices and values of owed + grad in one pass; what is then still owed goes to `out`.

    `scopes` are the (start, stop) that have a cut of their own; `data` has 8 * n bytes. Returns
    the bytes used.
    """
    n, count = grad.size, 0
    index = at(data, np.uint8, 8 * n, True)
    value = index + 4 * n  # where values wait for the last index
    addresses = floats(grad, n), floats(owed, n), floats(out, n, True)
    for start, stop in scopes:
        part = grad[start:stop]
        more, have, rest = (address + 4 * start for address in addresses)
        count += lib.mp_drop_encode(more, have, rest, part.size,
                                    _drop_cut(part, have, rate, draws), start, index + 4 * count,
                                    value + 4 * count)
    ctypes.memmove(index + 4 * count, value, 4 * count)
    if not lib.mp_finite_bytes(value, count):
        reference.drop_decode_add(data[:8 * count], -1.0, out)  # says so
    return 8 * count


def _drop_decode(payloads, weight, out, fresh):
    return lib.mp_drop_decode(*some_payloads(payloads, 8), len(payloads), weight,
                              floats(out, out.size, True), out.size, fresh)


@or_reference
def drop_decode_add(data, weight, out):
    result = _drop_decode([data], weight, out, False)
    refused(result, reference.drop_decode_add, data, weight, out)


def drop_decode_sum(payloads, weight, out):
    """out = the sum of weight * value at the indices named, over the payloads in their order."""
    decode_sum(lambda: _drop_decode(payloads, weight, out, True),
               lambda _, data: reference.drop_decode_add(data, weight, out), payloads, out)
