"""TernGrad's clipping and codes, on the device."""

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
from mpicomp.kernels.gpu.sums import fold, largest

_PACKINGS = {"2bit": 0, "planar": 1, "int8": 2, "int16": 3, "5trit": 4}


def _level(x, clip, code):
    """(level, scale), each float32 on the device."""
    d, n = device.current(), x.size
    lanes, result = None, d.empty(2, np.float32)
    if clip and n:
        blocks = -(-n // 1024)
        sums = d.empty(64 * blocks, np.float64)
        d.launch("terngrad_sums", 32 * blocks, x, n, sums)
        lanes = fold(sums, 2, blocks, 32)
    d.launch("terngrad_level", 1, lanes, n, clip, code, largest(x), result)
    return result[0], result[1]


@or_host(reference.terngrad_scale)
def terngrad_scale(x, clip):
    return _level(floats(x), clip, False)


@or_host(reference.terngrad_scale_code)
def terngrad_scale_code(x, clip):
    return _level(floats(x), clip, True)


def _terngrad_encode(x, level, scale, key, start, packing, data):
    n, level, scale = floats(x).size, scalar(level), scalar(scale)
    size = reference.terngrad_size(n, packing)
    if data.size != size:
        raise ValueError(f"terngrad: {size} bytes expected for {n} codes, found {data.size}")
    threads = {"2bit": size, "5trit": size, "planar": -(-size // 4)}.get(packing, -(-n // 4))
    with room(data, 2 if packing == "int16" else 1, size) as packet:
        device.current().launch("terngrad_encode", threads, x, n, level, scale, *philox_key(key),
                                start, _PACKINGS[packing], packet)


@or_host(reference.terngrad_encode)
def terngrad_encode(x, level, scale, key, start, packing, data):
    _terngrad_encode(x, level, scale, key, start, packing, data)


@or_host(reference.terngrad_encode_5trit)
def terngrad_encode_5trit(x, level, scale, key, start, data):
    _terngrad_encode(x, level, scale, key, start, "5trit", data)


def _terngrad_decode(payloads, scales, packing, weight, out, fresh, decode_add):
    n, fault = floats(out).size, new_fault()
    size, scales = reference.terngrad_size(n, packing), [scalar(s) for s in scales]
    packets = [payload(data, 2 if packing == "int16" else 1, size) for data in payloads]
    device.current().launch("terngrad_decode", n, table(packets), table(scales), len(packets),
                            _PACKINGS[packing], weight, out, n, fresh, fault)
    checked(fault, refusals(decode_add, payloads, out))


@or_host(reference.terngrad_decode_add)
def terngrad_decode_add(data, scale, packing, weight, out):
    _terngrad_decode([data], [scale], packing, weight, out, False, lambda _, data, out:
                     reference.terngrad_decode_add(data, 0, packing, weight, out))


@or_host(reference.terngrad_decode_add_5trit)
def terngrad_decode_add_5trit(data, scale, weight, out):
    _terngrad_decode([data], [scale], "5trit", weight, out, False, lambda _, data, out:
                     reference.terngrad_decode_add_5trit(data, 0, weight, out))


def terngrad_decode_sum(payloads, scales, packing, weight, out):
    """out = the sum of code * (weight * scale), a scale each, over the payloads in their order."""
    _terngrad_decode(payloads, scales, packing, weight, out, True, lambda _, data, out:
                     reference.terngrad_decode_add(data, 0, packing, weight, out))
