"""AdaComp's bins and entries, compiled."""

import ctypes
from ctypes import c_float, c_int64
from math import isfinite

import numpy as np

from mpicomp.errors import PacketError
from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import (
    Unfit,
    accepted,
    at,
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


@or_reference(reference.adacomp_encode)
def adacomp_encode(g, grad, factor, size, data):
    return _adacomp_encode(g, grad, None, factor, size, data)


@or_reference(reference.adacomp_encode_layers)
def adacomp_encode_layers(grad, owed, out, factor, layers, data):
    if owed is None:
        return reference.adacomp_packet(layers, data, lambda at_, size, room: adacomp_encode(
            grad[at_], grad[at_], factor, size, room))
    n, most = grad.size, sum(width * segment.size for _, segment, _, width in layers)
    floats(grad, n), floats(owed, n), floats(out, n, True)  # all fit, before any is changed
    at(data, np.uint8, 8 * len(layers) + most, True)
    return reference.adacomp_packet(layers, data, lambda at_, size, room: _adacomp_owed(
        grad[at_], owed[at_], out[at_], factor, size, room))


def _adacomp_owed(grad, owed, out, factor, size, data):
    n = grad.size
    if n == 0:
        return 0, np.float32(0)
    count, scale = _adacomp_encode(owed, grad, floats(out, n, True), factor, size, data)
    if count < 0 or not isfinite(scale):
        raise PacketError("adacomp: a number in the payload is not finite")
    return count, scale


def _adacomp_decode(payloads, scales, size, weight, out, fresh):
    width = reference.adacomp_width(size)
    addresses, sizes = some_payloads(payloads, width)
    counts = (c_int64 * len(payloads))(*[bytes_ // width for bytes_ in sizes])
    return lib.mp_adacomp_decode(addresses, counts, (c_float * len(scales))(*scales),
                                 len(payloads), size, width, weight,
                                 floats(out, out.size, True), out.size, fresh)


@or_reference(reference.adacomp_decode_add)
def adacomp_decode_add(data, scale, size, weight, out):
    result = _adacomp_decode([data], [scale], size, weight, out, False)
    refused(result, reference.adacomp_decode_add, data, scale, size, weight, out)


def adacomp_decode_layers(layers, weight, out):
    """The reference's, layer by layer compiled."""
    for packet in zip(*[zip(entries, scales) for _, _, entries, scales in layers]):
        for (at_, size, *_), (entries, scale) in zip(layers, packet):
            adacomp_decode_add(entries, scale, size, weight, out[at_])


@or_reference(reference.adacomp_decode_sum)
def adacomp_decode_sum(layers, weight, out):
    for at_, size, payloads, scales in layers:
        accepted(_adacomp_decode(payloads, scales, size, weight, out[at_], True))
