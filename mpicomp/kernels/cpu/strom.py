"""Strom's threshold and words, compiled."""

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


@or_reference(reference.strom_encode)
def strom_encode(x, tau, strict, data):
    return lib.mp_strom_encode(floats(x, x.size), None, None, x.size, tau, strict,
                               at(data, np.uint8, 4 * x.size, True))


@or_reference(reference.strom_encode_owed)
def strom_encode_owed(grad, owed, out, tau, strict, data):
    n = grad.size
    return lib.mp_strom_encode(floats(grad, n), floats(owed, n), floats(out, n, True), n, tau,
                               strict, at(data, np.uint8, 4 * n, True))


def _strom_decode(payloads, tau, weight, out, fresh):
    return lib.mp_strom_decode(*some_payloads(payloads, 4), len(payloads), tau, weight,
                               floats(out, out.size, True), out.size, fresh)


@or_reference(reference.strom_decode_add)
def strom_decode_add(data, tau, weight, out):
    result = _strom_decode([data], tau, weight, out, False)
    refused(result, reference.strom_decode_add, data, tau, weight, out)


@or_reference(reference.strom_decode_sum)
def strom_decode_sum(payloads, tau, weight, out):
    accepted(_strom_decode(payloads, tau, weight, out, True))
