"""Gradient dropping, compiled."""

import ctypes

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import (
    accepted,
    at,
    floats,
    lib,
    or_reference,
    refused,
    some_payloads,
)


def _dropping_cut(grad, owed, rate, draws, first_version=False):
    n = grad.size
    if n < 2:
        return np.float32(0)
    size, span, number = reference.dropping_sample(n, rate, draws, first_version)
    return np.float32(lib.mp_dropping_cut(floats(grad, n), owed, span, size, number))


@or_reference(reference.dropping_cut)
def dropping_cut(x, rate, draws, first_version=False):
    return _dropping_cut(x, None, rate, draws, first_version)


@or_reference(reference.dropping_select)
def dropping_select(x, cut, start, data):
    return lib.mp_dropping_encode(floats(x, x.size), None, None, x.size, cut, start,
                                  at(data, np.uint8, 4 * x.size, True), None)


@or_reference(reference.dropping_values)
def dropping_values(x, count, data):
    accepted(lib.mp_dropping_values(floats(x, x.size), x.size, count,
                                    at(data, np.uint8, 8 * count, True)))


@or_reference(reference.dropping_encode_owed)
def dropping_encode_owed(grad, owed, out, scopes, rate, draws, data):
    n, count = grad.size, 0
    index = at(data, np.uint8, 8 * n, True)
    value = index + 4 * n  # where values wait for the last index
    addresses = floats(grad, n), floats(owed, n), floats(out, n, True)
    for start, stop in scopes:
        part = grad[start:stop]
        more, have, rest = (address + 4 * start for address in addresses)
        cut = _dropping_cut(part, have, rate, draws)
        count += lib.mp_dropping_encode(more, have, rest, part.size, cut, start, index + 4 * count,
                                        value + 4 * count)
    ctypes.memmove(index + 4 * count, value, 4 * count)
    if not lib.mp_finite_bytes(value, count):
        reference.dropping_decode_add(data[:8 * count], -1.0, out)  # says so
    return 8 * count


def _dropping_decode(payloads, weight, out, fresh):
    return lib.mp_dropping_decode(*some_payloads(payloads, 8), len(payloads), weight,
                                  floats(out, out.size, True), out.size, fresh)


@or_reference(reference.dropping_decode_add)
def dropping_decode_add(data, weight, out):
    result = _dropping_decode([data], weight, out, False)
    refused(result, reference.dropping_decode_add, data, weight, out)


@or_reference(reference.dropping_decode_sum)
def dropping_decode_sum(payloads, weight, out):
    accepted(_dropping_decode(payloads, weight, out, True))


def dropping_signs_encode(x, scopes, rate, draws, first_version, data):
    """The reference's, with compiled cuts."""
    used = 8 * len(scopes)
    means = data[:used].view(np.float32).reshape(-1, 2)
    for own, (start, stop) in zip(means, scopes):
        cut = dropping_cut(x[start:stop], rate, draws, first_version)
        used += 4 * reference.dropping_signs(x[start:stop], cut, start, own, data[used:])
    return used
