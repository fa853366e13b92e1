"""Codes with a scale for each block, compiled."""

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import (
    Unfit,
    accepted,
    all_payloads,
    floats,
    lib,
    or_reference,
    payload,
    philox_key,
    refused,
)
from mpicomp.philox import Key

_FORMS = {"int": 0, "fp8": 1}


def _block_encode(grad, owed, out, size, form, levels, norm, key, start, data):
    n = grad.size
    if size % 32:
        raise Unfit()
    return lib.mp_block_encode(
        floats(grad, n), owed, out, n, size, _FORMS[form], levels, norm == "l2", key is not None,
        *philox_key(key or Key()), start,
        payload(data, reference.block_bytes(n, size, form, levels), True))


@or_reference(reference.block_encode)
def block_encode(x, size, form, levels, norm, key, start, data):
    _block_encode(x, None, None, size, form, levels, norm, key, start, data)


@or_reference(reference.block_encode_owed)
def block_encode_owed(grad, owed, out, size, form, levels, norm, key, start, data):
    n = grad.size
    result = _block_encode(grad, floats(owed, n), floats(out, n, True), size, form, levels, norm,
                           key, start, data)
    refused(result, reference.block_decode_add, data, size, form, levels, -1.0, out)


def _block_decode(payloads, size, form, levels, weight, out, fresh):
    if size % 32:
        raise Unfit()
    n = out.size
    payloads = all_payloads(payloads, reference.block_bytes(n, size, form, levels))
    return lib.mp_block_decode(payloads, len(payloads), size, _FORMS[form], levels, weight,
                               floats(out, n, True), n, fresh)


@or_reference(reference.block_decode_add)
def block_decode_add(data, size, form, levels, weight, out):
    result = _block_decode([data], size, form, levels, weight, out, False)
    refused(result, reference.block_decode_add, data, size, form, levels, weight, out)


@or_reference(reference.block_decode_sum)
def block_decode_sum(payloads, size, form, levels, weight, out):
    accepted(_block_decode(payloads, size, form, levels, weight, out, True))
