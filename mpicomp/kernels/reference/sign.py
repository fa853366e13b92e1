"""Signs with one mean magnitude for each group of elements, in NumPy.

Arguments throughout: `length` elements of the tensor, one after the other, are a group; the last
one may be shorter.
"""

import numpy as np

from mpicomp.errors import PacketError
from mpicomp.kernels.reference.sums import fold


def sign_groups(n, length):
    """The groups of n elements."""
    return -(-n // length)


def sign_bytes(n, length):
    """The bytes of a tensor: four for each group, then each group's bits, from a whole byte on."""
    groups = sign_groups(n, length)
    last = n - (groups - 1) * length
    return 4 * groups + (groups - 1) * -(-length // 8) + -(-last // 8) if n else 0


def _padded(x, length):
    """x as a matrix [groups, length], with zeros at the end."""
    v = np.zeros((sign_groups(x.size, length), length), np.float32)
    v.reshape(-1)[:x.size] = x
    return v


def sign_scales(x, length):
    """float32[groups]: the sum of the magnitudes of each, in the order of `total`, over its length.

    EF-signSGD, algorithm 1: ||p||_1 / d.
    """
    v = np.abs(_padded(x, length))
    groups, rows = v.shape[0], -(-length // 32)
    lanes = np.zeros((groups, 32 * rows), np.float32)
    lanes[:, :length] = v
    with np.errstate(over="ignore", invalid="ignore"):
        sums = fold(fold(lanes.reshape(groups, rows, 32).swapaxes(0, 1)).T)
    counts = np.full(groups, length, np.int64)
    counts[groups - 1:] = x.size - (groups - 1) * length
    return sums / counts.astype(np.float32)


def sign_encode(x, length, data):
    """data = float32 scale[groups], then the bits of each group: 1 where x >= 0.

    Element i of a group is bit i % 8 of byte i // 8; the bits after the last are 0.
    """
    if not x.size:
        return
    scales = sign_scales(x, length)
    data[:4 * scales.size].view(np.float32)[:] = scales
    bits = (_padded(x, length) >= 0) & (_padded(np.ones_like(x), length) > 0)
    packed = np.packbits(bits, axis=1, bitorder="little").reshape(-1)
    data[4 * scales.size:] = packed[:data.size - 4 * scales.size]


def sign_decode_add(data, length, weight, out):
    """out += weight * (scale where the bit is 1, else -scale)."""
    n, groups = out.size, sign_groups(out.size, length)
    if not n:
        return
    scales = data[:4 * groups].view(np.float32)
    if (data[:4 * groups].view(np.uint32) >= 0x7F800000).any():  # negative, infinite or no number
        raise PacketError(f"sign: scales from 0 up expected, found {scales.min()} to "
                          f"{scales.max()}")
    packed = np.zeros(groups * -(-length // 8), np.uint8)
    packed[:data.size - 4 * groups] = data[4 * groups:]
    bits = np.unpackbits(packed.reshape(groups, -1), axis=1, bitorder="little")
    ends = np.full((groups, 1), length)
    ends[groups - 1:] = n - (groups - 1) * length
    if bits[np.arange(bits.shape[1]) >= ends].any():
        raise PacketError("sign: the bits after the last of a group are not 0")
    values = np.where(bits[:, :length], scales[:, None], -scales[:, None])
    out += values.reshape(-1)[:n] * np.float32(weight)


def sign_encode_owed(grad, owed, out, length, data):
    """`sign_encode` of owed + grad; what is then still owed goes to `out`."""
    np.add(owed, grad, out=out)
    sign_encode(out, length, data)
    sign_decode_add(data, length, -1.0, out)


def sign_decode_sum(payloads, length, weight, out):
    """out = the sum of weight * the value of each bit, over the payloads in their order."""
    out[...] = 0
    for data in payloads:
        sign_decode_add(data, length, weight, out)
