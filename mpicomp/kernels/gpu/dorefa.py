"""DoReFa's codes, on the device."""

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.gpu import device
from mpicomp.kernels.gpu.arguments import (
    checked,
    floats,
    new_fault,
    or_host,
    payload,
    philox_key,
    refusals,
    room,
    scalar,
    table,
)
from mpicomp.kernels.gpu.sums import host, largest

_WIDTHS = {"bits": 0, **reference.DOREFA_INTEGERS}


@or_host(reference.dorefa_scale)
def dorefa_scale(x):
    return largest(floats(x)).view(np.float32)[0]


def _dorefa_encode(x, more, out, scale, bits, packing, key, start, data, fault):
    n = floats(x).size
    size = reference.dorefa_size(n, bits, packing)
    if data.size != size:
        raise ValueError(f"dorefa: {size} bytes expected for {n} codes, found {data.size}")
    width = _WIDTHS[packing]
    with room(data, width or 1, size) as packet:
        device.current().launch("dorefa_encode", -(-n // 8), x, more, out, n, scalar(scale), bits,
                                *philox_key(key), start, width, packet, fault)


@or_host(reference.dorefa_encode)
def dorefa_encode(x, scale, bits, packing, key, start, data):
    _dorefa_encode(x, None, None, scale, bits, packing, key, start, data, None)


def dorefa_encode_owed(grad, owed, out, scale, bits, packing, key, start, data):
    """`dorefa_encode` of owed + grad; what is then still owed goes to `out`."""
    n, fault = grad.size, new_fault()
    _dorefa_encode(floats(owed, n), floats(grad), floats(out, n), scale, bits, packing, key, start,
                   data, fault)
    checked(fault, _refusals([data], [scale], bits, packing, -1.0, out))


def _dorefa_decode(payloads, scales, bits, packing, weight, out, fresh):
    n, width, fault = floats(out).size, _WIDTHS[packing], new_fault()
    size, kept = reference.dorefa_size(n, bits, packing), [scalar(s) for s in scales]
    packets = [payload(data, width or 1, size) for data in payloads]
    device.current().launch("dorefa_decode", n, table(packets), table(kept), len(packets), bits,
                            width, weight, out, n, fresh, fault)
    checked(fault, _refusals(payloads, kept, bits, packing, weight, out))


def _refusals(payloads, scales, bits, packing, weight, out):
    def decode_add(number, data, out):
        scale = host(scalar(scales[number])).reshape(-1)[0]
        reference.dorefa_decode_add(data, scale, bits, packing, weight, out)

    return refusals(decode_add, payloads, out)


@or_host(reference.dorefa_decode_add)
def dorefa_decode_add(data, scale, bits, packing, weight, out):
    _dorefa_decode([data], [scale], bits, packing, weight, out, False)


def dorefa_decode_sum(payloads, scales, bits, packing, weight, out):
    """out = the sum of weight * what the codes mean, over the payloads in their order."""
    _dorefa_decode(payloads, scales, bits, packing, weight, out, True)
