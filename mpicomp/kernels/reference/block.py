"""Codes with a scale for each block of elements: whole numbers or 8-bit floats, in NumPy.

Arguments throughout: `size` elements of the tensor share a scale (a multiple of 32, the last block
may be shorter); `form` "int" has the codes -levels ... levels, "fp8" the numbers of e4m3, of which
`levels` = 448 is the largest; `key` is None to round to the nearest code, else code and next code
are drawn at random, so that their expectation is the number.
"""

import numpy as np

from mpicomp import philox
from mpicomp.errors import PacketError
from mpicomp.kernels.reference.dorefa import dorefa_pack
from mpicomp.kernels.reference.sums import fold

BLOCK_E4M3 = 448  # the largest e4m3 number: 4 bits of exponent, 3 of mantissa, no infinity
BLOCK_LEAST = 0x0080  # the least scale but 0: 2**-126 as bfloat16, the least with an inverse
_INFINITE = 0x7F80  # as bfloat16
_SIZES = np.array([(8 * (c > 7) + c % 8) * 2.0**(max(c // 8, 1) - 10) for c in range(127)])
_VALUES = np.concatenate([_SIZES, [np.nan], -_SIZES, [np.nan]]).astype(np.float32)  # of e4m3 bytes


def block_width(form, levels):
    """The bits of a code: 8, or as many as two's complement needs for -levels ... levels."""
    return 8 if form == "fp8" else levels.bit_length() + 1


def block_bytes(n, size, form, levels):
    """The bytes of a tensor of n elements: two for each block begun, then the codes."""
    return 2 * -(-n // size) + -(-n * block_width(form, levels) // 8)


def block_most(levels):
    """The largest scale, as bfloat16: what `levels` can multiply without overflow."""
    return int((np.finfo(np.float32).max / np.float32(levels)).view(np.uint32)) >> 16


def block_scales(x, size, levels, norm):
    """The scale of each block as bfloat16, in uint16.

    norm "max": the largest magnitude divided by `levels`, in float32. "l2": the root of the sum of
    squares (float64, in the order of `total`) divided by `levels`, then float32. Rounded up to
    bfloat16, so that no code exceeds `levels`, and held to BLOCK_LEAST ... `block_most`. A block of
    zeros has 0. Where an element is not finite the scale is infinite, which decoding refuses.
    """
    blocks = -(-x.size // size)
    v = np.zeros((blocks, size), np.float32)
    v.reshape(-1)[:x.size] = x
    largest = (v.view(np.uint32) & 0x7FFFFFFF).max(axis=1, initial=0)
    if norm == "max":
        wide = largest.view(np.float32) / np.float32(levels)
    else:
        squares = v.astype(np.float64) * v
        lanes = fold(squares.reshape(blocks, size // 32, 32).swapaxes(0, 1))
        with np.errstate(over="ignore"):
            wide = (np.sqrt(fold(lanes.T)) / levels).astype(np.float32)
    up = (wide.view(np.uint32).astype(np.int64) + 0xFFFF) >> 16
    scales = np.clip(up, BLOCK_LEAST, block_most(levels))
    scales[largest == 0] = 0
    scales[largest >= 0x7F800000] = _INFINITE
    return scales.astype(np.uint16)


def block_rounded(y, draws):
    """Whole numbers: the nearest (half to even), or without `draws` = None the one below or above.

    It is the one above where a draw, uniform in [0, 1), is less than the distance from below.
    """
    if draws is None:
        return np.rint(y)
    below = np.floor(y)
    return below + (draws < y - below)


def block_codes(y, form, levels, draws):
    """uint8 codes of y = x / scale, held to -levels ... levels.

    int: two's complement. fp8: e4m3, sign << 7 | exponent << 3 | mantissa; a magnitude from
    2**(e - 7) to 2**(e - 6), or below 2**-6 for e = 1, is rounded to a multiple of 2**(e - 10).
    """
    y = np.clip(y, np.float32(-levels), np.float32(levels))
    if form == "int":
        return block_rounded(y, draws).astype(np.int8).view(np.uint8)
    bits = y.view(np.uint32)
    exponent = np.maximum(bits >> 23 & 0xFF, 121).astype(np.int32) - 120
    steps = block_rounded(np.ldexp(np.abs(y), 10 - exponent), draws).astype(np.int32)
    return (((exponent << 3) + steps - 8) | (bits >> 31 << 7)).astype(np.uint8)


def block_encode(x, size, form, levels, norm, key, start, data):
    """data = the scales of all blocks, bfloat16, then the codes, one after the other.

    A code of y = x * (1 / scale), in float32. Bit j of code i is bit (i * width + j) % 8 of byte
    (i * width + j) // 8; what is left of the last byte is 0. The random word is that of element
    `start` + i of the bucket.
    """
    scales, width = block_scales(x, size, levels, norm), block_width(form, levels)
    data[:2 * scales.size].view(np.uint16)[:] = scales
    wide = np.repeat((scales.astype(np.uint32) << 16).view(np.float32), size)[:x.size]
    spoken = (wide > 0) & (wide < np.inf)
    y = np.where(spoken, x, np.float32(0)) * (np.float32(1) / np.where(spoken, wide, np.float32(1)))
    draws = None if key is None else philox.uniform(key, start, x.size)
    codes = np.where(spoken, block_codes(y, form, levels, draws), np.uint8(0))
    dorefa_pack(codes, width, "bits", data[2 * scales.size:])


def block_decode_add(data, size, form, levels, weight, out):
    """out += weight * (scale * code); the product of scale and code is exact in float32."""
    n, width, blocks = out.size, block_width(form, levels), -(-out.size // size)
    scales, most = data[:2 * blocks].view(np.uint16), block_most(levels)
    wrong = scales[(scales != 0) & ((scales < BLOCK_LEAST) | (scales > most))]
    if wrong.size:
        raise PacketError(f"the scale of a block is bfloat16 {wrong[0]:#06x}, 0 or "
                          f"{BLOCK_LEAST:#06x} to {most:#06x} expected")
    digits = np.unpackbits(data[2 * blocks:], bitorder="little")
    if digits[n * width:].any():
        raise PacketError("the bits after the last code of a tensor are not 0")
    codes = np.packbits(digits[:n * width].reshape(n, width), axis=1, bitorder="little").reshape(-1)
    if form == "fp8":
        values = _VALUES[codes]
    else:
        half = np.int16(1 << (width - 1))
        values = ((codes ^ half) - half).astype(np.float32)
    if not (np.abs(values) <= levels).all():  # NaN neither
        raise PacketError(f"a code of {width} bits stands for no number from -{levels} to {levels}")
    wide = np.repeat((scales.astype(np.uint32) << 16).view(np.float32), size)[:n]
    out += wide * values * np.float32(weight)


def block_encode_owed(grad, owed, out, size, form, levels, norm, key, start, data):
    """`block_encode` of owed + grad; what is then still owed goes to `out`."""
    np.add(owed, grad, out=out)
    block_encode(out, size, form, levels, norm, key, start, data)
    block_decode_add(data, size, form, levels, -1.0, out)


def block_decode_sum(payloads, size, form, levels, weight, out):
    """out = the sum of weight * (scale * code) over the payloads, in their order."""
    out[...] = 0
    for data in payloads:
        block_decode_add(data, size, form, levels, weight, out)
