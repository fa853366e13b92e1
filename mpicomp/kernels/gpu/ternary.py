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
        d.launch("ternary_sums", 32 * blocks, x, n, sums)
        lanes = fold(sums, 2, blocks, 32)
    d.launch("ternary_level", 1, lanes, n, clip, code, largest(x), result)
    return result[0], result[1]


@or_host
def ternary_scale(x, clip):
    return _level(floats(x), clip, False)


@or_host
def ternary_scale_code(x, clip):
    return _level(floats(x), clip, True)


def _ternary_encode(x, level, scale, key, start, packing, data):
    n, level, scale = floats(x).size, scalar(level), scalar(scale)
    size = reference.ternary_size(n, packing)
    if data.size != size:
        raise ValueError(f"terngrad: {size} bytes expected for {n} codes, found {data.size}")
    threads = {"2bit": size, "5trit": size, "planar": -(-size // 4)}.get(packing, -(-n // 4))
    with room(data, 2 if packing == "int16" else 1, size) as packet:
        device.current().launch("ternary_encode", threads, x, n, level, scale, *philox_key(key),
                                start, _PACKINGS[packing], packet)


@or_host
def ternary_encode(x, level, scale, key, start, packing, data):
    _ternary_encode(x, level, scale, key, start, packing, data)


@or_host
def ternary_encode_5trit(x, level, scale, key, start, data):
    _ternary_encode(x, level, scale, key, start, "5trit", data)


def _ternary_decode(payloads, scales, packing, weight, out, fresh, decode_add):
    n, fault = floats(out).size, new_fault()
    size, scales = reference.ternary_size(n, packing), [scalar(s) for s in scales]
    packets = [payload(data, 2 if packing == "int16" else 1, size) for data in payloads]
    device.current().launch("ternary_decode", n, table(packets), table(scales), len(packets),
                            _PACKINGS[packing], weight, out, n, fresh, fault)
    checked(fault, refusals(decode_add, payloads, out))


@or_host
def ternary_decode_add(data, scale, packing, weight, out):
    _ternary_decode([data], [scale], packing, weight, out, False, lambda _, data, out:
                    reference.ternary_decode_add(data, 0, packing, weight, out))


@or_host
def ternary_decode_add_5trit(data, scale, weight, out):
    _ternary_decode([data], [scale], "5trit", weight, out, False, lambda _, data, out:
                    reference.ternary_decode_add_5trit(data, 0, weight, out))


def ternary_decode_sum(payloads, scales, packing, weight, out):
    """out = the sum of code * (weight * scale), a scale each, over the payloads in their order."""
    _ternary_decode(payloads, scales, packing, weight, out, True, lambda _, data, out:
                    reference.ternary_decode_add(data, 0, packing, weight, out))
