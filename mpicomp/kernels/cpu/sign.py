"""Signs and a mean magnitude for each group, compiled."""

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import (
    accepted,
    all_payloads,
    floats,
    lib,
    or_reference,
    payload,
    refused,
)


def _sign_encode(grad, owed, out, length, data):
    n = grad.size
    size = reference.sign_bytes(n, length)
    return lib.mp_sign_encode(floats(grad, n), owed, out, n, length, payload(data, size, True))


@or_reference(reference.sign_encode)
def sign_encode(x, length, data):
    _sign_encode(x, None, None, length, data)


@or_reference(reference.sign_encode_owed)
def sign_encode_owed(grad, owed, out, length, data):
    n = grad.size
    result = _sign_encode(grad, floats(owed, n), floats(out, n, True), length, data)
    refused(result, reference.sign_decode_add, data, length, -1.0, out)


def _sign_decode(payloads, length, weight, out, fresh):
    payloads = all_payloads(payloads, reference.sign_bytes(out.size, length))
    return lib.mp_sign_decode(payloads, len(payloads), length, weight, floats(out, out.size, True),
                              out.size, fresh)


@or_reference(reference.sign_decode_add)
def sign_decode_add(data, length, weight, out):
    result = _sign_decode([data], length, weight, out, False)
    refused(result, reference.sign_decode_add, data, length, weight, out)


@or_reference(reference.sign_decode_sum)
def sign_decode_sum(payloads, length, weight, out):
    accepted(_sign_decode(payloads, length, weight, out, True))
