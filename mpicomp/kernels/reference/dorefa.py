"""DoReFa's k-bit stochastic codes and their packings, in NumPy."""

import numpy as np

from mpicomp import philox
from mpicomp.errors import PacketError
from mpicomp.kernels.reference.sums import finite

DOREFA_INTEGERS = {"int8": 1, "int16": 2, "int32": 4}  # bytes a code


def dorefa_scale(x):
    """The largest magnitude: max0(|dr|), over the whole tensor."""
    return np.float32(np.abs(x).max()) if x.size else np.float32(0)


def dorefa_codes(x, scale, bits, draws):
    """uint8 codes q = quantize_k(x / (2 m) + 1/2 + N(k)) in 0 ... n, where n = 2**bits - 1.

    `draws` are uniform in [-0.5, 0.5): N(k) = draw / n. In float32, one operation after the
    other: t = x / m, y = t * (n / 2), y = y + n / 2, y = y + draw, rounded to the nearest whole
    number (half to even), held to 0 ... n. Dividing by m first keeps subnormal and huge m safe.
    """
    n = 2**bits - 1
    half = np.float32(n / 2)
    y = x / np.float32(scale) * half + half + draws
    return np.clip(np.rint(y), np.float32(0), np.float32(n)).astype(np.uint8)


def dorefa_size(n, bits, packing):
    """The bytes of n packed codes."""
    return -(-n * bits // 8) if packing == "bits" else DOREFA_INTEGERS[packing] * n


def dorefa_pack(codes, bits, packing, data):
    """Codes q to bytes.

    bits: bit j of code i is bit (i * bits + j) % 8 of byte (i * bits + j) // 8, and what is left
    of the last byte is 0. int8, int16, int32: the integer 2 q - n each. It is odd about zero, so
    that a sum of such integers needs no offset, whatever the number of its terms.
    """
    if packing == "bits":
        digits = np.empty(codes.size * bits, np.uint8)
        for place in range(bits):
            digits[place::bits] = codes >> place & 1
        data[:] = np.packbits(digits, bitorder="little")
    else:
        data.view(packing)[:] = 2 * codes.astype(np.int32) - (2**bits - 1)


def dorefa_unpack(data, bits, packing, n):
    """The n integers 2 q - n (or sums of them) in `data`."""
    if packing != "bits":
        return data.view(packing)
    digits = np.unpackbits(data, bitorder="little")
    if digits[n * bits:].any():
        raise PacketError("dorefa: the bits after the last code are not 0")
    codes = np.zeros(n, np.int16)
    for place in range(bits):
        codes |= digits[place:n * bits:bits].astype(np.int16) << place
    return 2 * codes - np.int16(2**bits - 1)


def dorefa_encode(x, scale, bits, packing, key, start, data):
    """`dorefa_codes` with the random words of elements start ... of the bucket, then packed.

    A tensor of zeros (scale = 0) has nothing but zero bytes, and decodes to 0.
    """
    if not scale > 0:
        data[:] = 0
        return
    draws = philox.uniform(key, start, x.size) - np.float32(0.5)
    dorefa_pack(dorefa_codes(x, scale, bits, draws), bits, packing, data)


def dorefa_decode_add(data, scale, bits, packing, weight, out):
    """out += weight * (((2 q - n) / n) * scale), that is 2 m (q / n - 1/2): linear in the codes."""
    codes = dorefa_unpack(data, bits, packing, out.size).astype(np.float32)
    with np.errstate(over="ignore"):
        values = codes / np.float32(2**bits - 1) * np.float32(scale) * np.float32(weight)
    if not finite(values):
        raise PacketError("dorefa: a value in the payload is not finite")
    out += values


def dorefa_encode_owed(grad, owed, out, scale, bits, packing, key, start, data):
    """`dorefa_encode` of owed + grad; what is then still owed goes to `out`."""
    np.add(owed, grad, out=out)
    dorefa_encode(out, scale, bits, packing, key, start, data)
    dorefa_decode_add(data, scale, bits, packing, -1.0, out)


def dorefa_decode_sum(payloads, scales, bits, packing, weight, out):
    """out = the sum of weight * what the codes mean, a scale each, over the payloads in order."""
    out[...] = 0
    for data, scale in zip(payloads, scales, strict=True):
        dorefa_decode_add(data, scale, bits, packing, weight, out)
