"""AdaComp's bins and entries, compiled."""

import ctypes
from ctypes import c_float, c_int64

import numpy as np

from mpicomp.errors import PacketError
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


def _adacomp_encode(base, grad, out, factor, size, data):
    n, width = base.size, reference.adacomp_width(size)
    if n == 0:
        raise Unfit()
    scale = c_float()
    count = lib.mp_adacomp_encode(floats(base, n), floats(grad, n), out, n, factor - 1, size,
                                  width, ctypes.byref(scale),
                                  at(data, np.uint8, width * n, True))
    return count, np.float32(scale.value)


@or_reference
def adacomp_encode(g, grad, factor, size, data):
    return _adacomp_encode(g, grad, None, factor, size, data)


def adacomp_encode_owed(grad, owed, out, factor, size, data):
    """`adacomp_encode` of owed + grad and grad; what is then still owed goes to `out`."""
    n = grad.size
    if n == 0:
        return 0, np.float32(0)
    count, scale = _adacomp_encode(owed, grad, floats(out, n, True), factor, size, data)
    if count < 0:
        raise PacketError("adacomp: a number in the payload is not finite")
    return count, scale


def _adacomp_decode(payloads, scales, size, weight, out, fresh):
    width = reference.adacomp_width(size)
    addresses, sizes = some_payloads(payloads, width)
    counts = (c_int64 * len(payloads))(*[bytes_ // width for bytes_ in sizes])
    return lib.mp_adacomp_decode(addresses, counts, (c_float * len(scales))(*scales),
                                 len(payloads), size, width, weight,
                                 floats(out, out.size, True), out.size, fresh)


@or_reference
def adacomp_decode_add(data, scale, size, weight, out):
    result = _adacomp_decode([data], [scale], size, weight, out, False)
    refused(result, reference.adacomp_decode_add, data, scale, size, weight, out)


def adacomp_decode_sum(layers, weight, out):
    """out[at] = the sum of +-(weight * scale) at the elements named, over the packets in order.

    `layers` are (at, bin, the entries in each packet, the scale in each packet).
    """
    for at_, size, payloads, scales in layers:
        _decode_sum(payloads, scales, size, weight, out[at_])


def _decode_sum(payloads, scales, size, weight, out):
    decode_sum(lambda: _adacomp_decode(payloads, scales, size, weight, out, True),
               lambda i, data: reference.adacomp_decode_add(data, scales[i], size, weight, out),
               payloads, out)
