"""TernGrad's clipping and codes, compiled."""

from ctypes import c_float

import numpy as np

from mpicomp.kernels import reference
from mpicomp.kernels.cpu.library import (
    accepted,
    all_payloads,
    floats,
    lib,
    or_reference,
    payload,
    philox_key,
    refused,
)

_PACKINGS = {"2bit": 0, "planar": 1, "int8": 2, "int16": 3}


def _terngrad_level(x, clip):
    """(clip * sigma or inf, max |x|), both float32."""
    levels = (c_float * 2)()
    lib.mp_terngrad_level(floats(x, x.size), x.size, clip, levels)
    return np.float32(levels[0]), np.float32(levels[1])


@or_reference(reference.terngrad_scale)
def terngrad_scale(x, clip):
    level, largest = _terngrad_level(x, clip)
    return level, min(largest, level)


@or_reference(reference.terngrad_scale_code)
def terngrad_scale_code(x, clip):
    level, largest = _terngrad_level(x, clip)
    return np.float32(np.inf), level if level < np.inf else largest


@or_reference(reference.terngrad_encode)
def terngrad_encode(x, level, scale, key, start, packing, data):
    size = reference.terngrad_size(x.size, packing)
    lib.mp_terngrad_encode(floats(x, x.size), x.size, level, scale, *philox_key(key), start,
                           _PACKINGS[packing], payload(data, size, True))


def _terngrad_decode(payloads, scales, packing, weight, out, fresh):
    payloads = all_payloads(payloads, reference.terngrad_size(out.size, packing))
    return lib.mp_terngrad_decode(payloads, (c_float * len(scales))(*scales), len(payloads),
                                  _PACKINGS[packing], weight, floats(out, out.size, True),
                                  out.size, fresh)


@or_reference(reference.terngrad_decode_add)
def terngrad_decode_add(data, scale, packing, weight, out):
    result = _terngrad_decode([data], [scale], packing, weight, out, False)
    refused(result, reference.terngrad_decode_add, data, scale, packing, weight, out)


@or_reference(reference.terngrad_decode_sum)
def terngrad_decode_sum(payloads, scales, packing, weight, out):
    accepted(_terngrad_decode(payloads, scales, packing, weight, out, True))
