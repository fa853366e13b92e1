"""DoReFa's codes, compiled."""

from ctypes import c_float

import numpy as np

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
)

_WIDTHS = {"bits": 0, **reference.DOREFA_INTEGERS}


@or_reference(reference.dorefa_scale)
def dorefa_scale(x):
    return np.float32(lib.mp_largest(floats(x, x.size), x.size))


def _dorefa_encode(grad, owed, out, scale, bits, packing, key, start, data):
    n = grad.size
    if not scale > 0:
        raise Unfit()
    return lib.mp_dorefa_encode(
        floats(grad, n), owed, out, n, scale, bits, *philox_key(key), start, _WIDTHS[packing],
        payload(data, reference.dorefa_size(n, bits, packing), True))


@or_reference(reference.dorefa_encode)
def dorefa_encode(x, scale, bits, packing, key, start, data):
    _dorefa_encode(x, None, None, scale, bits, packing, key, start, data)


@or_reference(reference.dorefa_encode_owed)
def dorefa_encode_owed(grad, owed, out, scale, bits, packing, key, start, data):
    n = grad.size
    accepted(_dorefa_encode(grad, floats(owed, n), floats(out, n, True), scale, bits, packing, key,
                            start, data))


def _dorefa_decode(payloads, scales, bits, packing, weight, out, fresh):
    payloads = all_payloads(payloads, reference.dorefa_size(out.size, bits, packing))
    return lib.mp_dorefa_decode(payloads, (c_float * len(scales))(*scales), len(payloads), bits,
                                _WIDTHS[packing], weight, floats(out, out.size, True), out.size,
                                fresh)


@or_reference(reference.dorefa_decode_add)
def dorefa_decode_add(data, scale, bits, packing, weight, out):
    if _dorefa_decode([data], [scale], bits, packing, weight, out, False) < 0:
        reference.dorefa_decode_add(data, scale, bits, packing, weight, out)


@or_reference(reference.dorefa_decode_sum)
def dorefa_decode_sum(payloads, scales, bits, packing, weight, out):
    accepted(_dorefa_decode(payloads, scales, bits, packing, weight, out, True))
