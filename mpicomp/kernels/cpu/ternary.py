"""TernGrad's clipping and codes, compiled."""

from ctypes import c_float

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import (
    all_payloads,
    decode_sum,
    floats,
    lib,
    or_reference,
    payload,
    philox_key,
    refused,
)

_PACKINGS = {"2bit": 0, "planar": 1, "int8": 2, "int16": 3}


def _ternary_level(x, clip):
    """(clip * sigma or inf, max |x|), both float32."""
    levels = (c_float * 2)()
    lib.mp_ternary_level(floats(x, x.size), x.size, clip, levels)
    return np.float32(levels[0]), np.float32(levels[1])


@or_reference
def ternary_scale(x, clip):
    level, largest = _ternary_level(x, clip)
    return level, min(largest, level)


@or_reference
def ternary_scale_code(x, clip):
    level, largest = _ternary_level(x, clip)
    return np.float32(np.inf), level if level < np.inf else largest


@or_reference
def ternary_encode(x, level, scale, key, start, packing, data):
    size = reference.ternary_size(x.size, packing)
    lib.mp_ternary_encode(floats(x, x.size), x.size, level, scale, *philox_key(key), start,
                          _PACKINGS[packing], payload(data, size, True))


def _ternary_decode(payloads, scales, packing, weight, out, fresh):
    payloads = all_payloads(payloads, reference.ternary_size(out.size, packing))
    return lib.mp_ternary_decode(payloads, (c_float * len(scales))(*scales), len(payloads),
                                 _PACKINGS[packing], weight, floats(out, out.size, True),
                                 out.size, fresh)


@or_reference
def ternary_decode_add(data, scale, packing, weight, out):
    result = _ternary_decode([data], [scale], packing, weight, out, False)
    refused(result, reference.ternary_decode_add, data, scale, packing, weight, out)


def ternary_decode_sum(payloads, scales, packing, weight, out):
    """out = the sum of code * (weight * scale), a scale each, over the payloads in their order."""
    decode_sum(lambda: _ternary_decode(payloads, scales, packing, weight, out, True),
               lambda i, data: reference.ternary_decode_add(data, scales[i], packing, weight, out),
               payloads, out)
