"""TernGrad's arithmetic and its packings, in NumPy."""

import numpy as np

from mpicomp import philox
from mpicomp.errors import PacketError
from mpicomp.kernels.reference.sums import total


def terngrad_scale(x, clip):
    """(level, scale): where this rank clips one layer, and the largest magnitude after clipping.

    level = clip * sigma, sigma the standard deviation about the mean, in float64 from the sums of
    x and x * x (TernGrad, section 3.4). No clipping, level = inf, where clip is 0 and where the
    level is less than 1e-6 of the largest magnitude: a single element or a constant tensor would
    be crushed to nothing.
    """
    if x.size == 0:
        return np.float32(np.inf), np.float32(0)
    largest = np.float32(np.abs(x).max())
    if clip == 0:
        return np.float32(np.inf), largest
    level = _level(x, clip, largest)
    return level, min(largest, level)


def _level(x, clip, largest):
    """clip * sigma, or inf where that is next to nothing beside the largest magnitude."""
    wide = x.astype(np.float64)
    mean = total(wide) / x.size
    variance = total(wide * wide) / x.size - mean * mean
    sigma = np.sqrt(max(variance, 0.0))
    level = np.float32(clip * sigma)
    if not level > 0 or largest * np.float32(1e-6) > level:
        return np.float32(np.inf)
    return level


def terngrad_scale_code(x, clip):
    """(inf, clip * sigma): the scaler of the authors' code, which does not look at the maximum.

    Nothing is clipped here: what exceeds the scaler that the ranks agree on is sent as that. The
    largest magnitude where clip or sigma is 0.
    """
    level, largest = np.float32(np.inf), np.float32(np.abs(x).max() if x.size else 0)
    if clip and x.size:
        level = _level(x, clip, largest)
    return np.float32(np.inf), level if level < np.inf else largest


def terngrad_codes(x, level, scale, draws):
    """int8 codes sgn(x) * b with P(b = 1) = min(|x|, level) / scale (TernGrad, equation 3).

    `draws` are uniform in [0, 1): b = 1 iff draw * scale < min(|x|, level). Zero has the code 0.
    """
    hit = draws * np.float32(scale) < np.minimum(np.abs(x), level)
    return np.where(hit, np.sign(x), 0).astype(np.int8)


def terngrad_size(n, packing):
    """The bytes of n packed codes."""
    return {"2bit": -(-n // 4), "planar": n // 4 + 1 if n else 0, "int8": n, "int16": 2 * n,
            "5trit": -(-n // 5)}[packing]


def terngrad_pack(codes, packing, data):
    """Codes -1, 0, 1 to bytes.

    2bit: byte j holds codes 4j ... 4j+3 plus one, the first in the lowest bits; missing codes at
    the end are written as 0. planar: the layout of the authors' code: padded with 4 - n % 4 values
    0, 1, 2, 3 and cut into four quarters, byte j = q0[j] + 4 q1[j] + 16 q2[j] + 64 q3[j].
    int8, int16: one integer each, which MPI can add.
    """
    n = codes.size
    if packing in ("int8", "int16"):
        data.view(packing)[:] = codes
    elif n:
        if packing == "2bit":
            digits = np.zeros(4 * data.size, np.uint8)
            digits[n:] = 0
            digits[:n] = codes + 1
            quarter = digits.reshape(-1, 4).T
        else:
            pad = np.arange(4 - n % 4, dtype=np.uint8)
            quarter = np.concatenate([(codes + 1).astype(np.uint8), pad]).reshape(4, -1)
        data[:] = quarter[0] | quarter[1] << 2 | quarter[2] << 4 | quarter[3] << 6


def terngrad_unpack(data, packing, n):
    """The n codes (or sums of codes) in `data`; PacketError where a 2-bit digit is 3."""
    if packing in ("int8", "int16"):
        return data.view(packing)
    digits = np.stack([data & 3, data >> 2 & 3, data >> 4 & 3, data >> 6])
    digits = (digits.T if packing == "2bit" else digits).reshape(-1)[:n]
    if digits.size and digits.max() > 2:
        raise PacketError("terngrad: the digit 3 stands in the payload, which has 0, 1 and 2 only")
    return digits.astype(np.int8) - np.int8(1)


def terngrad_encode(x, level, scale, key, start, packing, data):
    """`terngrad_codes` with the random words of elements start ... of the bucket, then packed."""
    draws = philox.uniform(key, start, x.size)
    terngrad_pack(terngrad_codes(x, level, scale, draws), packing, data)


def terngrad_decode_add(data, scale, packing, weight, out):
    """out += code * (weight * scale)."""
    codes = terngrad_unpack(data, packing, out.size)
    out += codes.astype(np.float32) * (np.float32(weight) * np.float32(scale))


def terngrad_decode_sum(payloads, scales, packing, weight, out):
    """out = the sum of code * (weight * scale), a scale each, over the payloads in their order."""
    out[...] = 0
    for data, scale in zip(payloads, scales, strict=True):
        terngrad_decode_add(data, scale, packing, weight, out)


_TRITS = np.array([1, 3, 9, 27, 81], np.uint8)


def terngrad_encode_5trit(x, level, scale, key, start, data):
    """Five codes a byte: the sum of (code + 1) * 3**i, the first at i = 0; missing ones are 0."""
    digits = np.zeros(5 * data.size, np.uint8)
    digits[:x.size] = terngrad_codes(x, level, scale, philox.uniform(key, start, x.size)) + 1
    data[:] = (digits.reshape(-1, 5) * _TRITS).sum(axis=1, dtype=np.uint8)


def terngrad_decode_add_5trit(data, scale, weight, out):
    """out += code * (weight * scale)."""
    digits = (data[:, None] // _TRITS % 3).reshape(-1)
    if (data > 242).any() or digits[out.size:].any():
        raise PacketError("terngrad: a byte of five trits is at most 242, and 0 where codes are "
                          "missing")
    codes = digits[:out.size].astype(np.float32) - np.float32(1)
    out += codes * (np.float32(weight) * np.float32(scale))
