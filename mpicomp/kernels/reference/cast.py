"""Dense float32 and the two 16-bit floats, in NumPy."""

import numpy as np

from mpicomp.errors import PacketError
from mpicomp.kernels.reference.sums import finite


def dense_decode_add(data, weight, out):
    """out += weight * float32[n]."""
    values = data.view(np.float32)
    if not finite(values):
        raise PacketError("dense: a value in the payload is not finite")
    out += values * np.float32(weight)


def dense_decode_sum(payloads, weight, out):
    """out = the sum of weight * float32[n] over the payloads, in their order."""
    out[...] = 0
    for data in payloads:
        dense_decode_add(data, weight, out)


def dense_scale(data, weight, out):
    """out = weight * float32[n]."""
    np.multiply(data.view(np.float32), np.float32(weight), out=out)
    if not finite(out):
        raise PacketError("dense: a value in the sum is not finite")


def cast_encode(x, kind, data):
    """x rounded to nearest even to "float16" or "bfloat16"; finite values saturate."""
    if kind == "float16":
        data.view(np.float16)[:] = np.clip(x, np.float32(-65504), np.float32(65504))
        return
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    overflow = ((bits & 0x7FFFFFFF) < 0x7F800000) & ((rounded & 0x7FFF) >= 0x7F80)
    rounded[overflow] -= 1
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded[nan] = (bits[nan] >> 16) | 0x40
    data.view(np.uint16)[:] = rounded


def cast_widen(data, kind):
    """The float32 values of 16-bit floats."""
    if kind == "float16":
        return data.view(np.float16).astype(np.float32)
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def cast_decode_add(data, kind, weight, out):
    """out += weight * the 16-bit floats."""
    values = cast_widen(data, kind)
    if not finite(values):
        raise PacketError(f"{kind}: a value in the payload is not finite")
    out += values * np.float32(weight)


def cast_decode_sum(payloads, kind, weight, out):
    """out = the sum of weight * the 16-bit floats over the payloads, in their order."""
    out[...] = 0
    for data in payloads:
        cast_decode_add(data, kind, weight, out)
