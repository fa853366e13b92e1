"""The largest of every block: offsets of 12 bits and values of 32, 8 or 2 bits, in NumPy."""

from functools import lru_cache

import numpy as np

from mpicomp.errors import PacketError
from mpicomp.kernels.reference.sums import finite, within

MOST_BLOCK = 4096  # an offset has 12 bits
MOST_STEP = np.float32(2.0**121 - 2.0**97)  # 127 of it are finite
WHOLE = 2.0**31  # the largest magnitude of a tensor, where magnitudes are counted in whole numbers


def chunks_keeps(size, block, k) -> int:
    """How many of a block of `size` elements are kept, where k of `block` are.

    max(1, round(k * size / block)); a half is rounded to the even number.
    """
    return max(1, round(k * size / block))


@lru_cache(maxsize=1024)
def chunks_plan(sizes, block, k):
    """int64[tensors + 1, 3]: how many elements, kept ones and blocks are before each tensor.

    Of tensors of these sizes, side by side; empty ones are left out. The last row has the totals.
    """
    rows = [(0, 0, 0)]
    for size in filter(None, sizes):
        whole, rest = divmod(size, block)
        keeps = whole * k + (chunks_keeps(rest, block, k) if rest else 0)
        start, kept, blocks = rows[-1]
        rows.append((start + size, kept + keeps, blocks + whole + (rest > 0)))
    plan = np.array(rows, np.int64)
    plan.flags.writeable = False  # it is kept for the next step
    return plan


def chunks_size(sizes, block, k, bits) -> int:
    """The bytes of a payload."""
    plan = chunks_plan(sizes, block, k)
    return sum(chunks_sizes(len(plan) - 1, int(plan[-1, 1]), bits))


def chunks_sizes(tensors, kept, bits):
    """The bytes of floats, of offsets and of codes."""
    floats, codes = {32: (kept, 0), 8: (tensors, kept), 2: (2 * tensors, -(-kept // 4))}[bits]
    return 4 * floats, -(-3 * kept // 2), codes


def _parts(data, plan, bits):
    """(float32 table or values, offsets, codes) of a payload, as views."""
    floats, offsets, _ = chunks_sizes(len(plan) - 1, int(plan[-1, 1]), bits)
    return data[:floats].view(np.float32), data[floats:floats + offsets], data[floats + offsets:]


@lru_cache(maxsize=16)
def _kept(sizes, block, k):
    """(tensor, first element of the block, its size, number in the block) of each kept element."""
    plan, parts = chunks_plan(sizes, block, k), []
    for t, ((start, kept, _), (stop, last, _)) in enumerate(zip(plan[:-1], plan[1:])):
        number = np.arange(last - kept)
        begin = start + number // k * block
        parts.append((np.full(number.size, t), begin, np.minimum(block, stop - begin), number % k))
    return tuple(np.concatenate(column) for column in zip(*parts)) or (np.zeros(0, np.int64),) * 4


def chunks_select(x, sizes, block, k):
    """int64[kept]: the offsets of the elements of largest magnitude in each block, ascending.

    Of equal magnitudes those of lower index are taken.
    """
    chosen, start = [np.zeros(0, np.int64)], 0
    for size in sizes:
        whole = size - size % block
        for blocks, keeps in ((x[start:start + whole].reshape(-1, block), k),
                              (x[start + whole:start + size].reshape(1, -1),
                               chunks_keeps(size % block, block, k))):
            if blocks.size:
                order = np.argsort(-np.abs(blocks), axis=1, kind="stable")[:, :keeps]
                chosen.append(np.sort(order, axis=1).reshape(-1))
        start += size
    return np.concatenate(chosen)


def chunks_pack(offsets):
    """uint8[ceil(3 n / 2)]: two offsets of 12 bits in three bytes, the lower bits first."""
    pairs = np.zeros((-(-offsets.size // 2), 2), np.uint32)
    pairs.reshape(-1)[:offsets.size] = offsets
    words = pairs[:, 0] | pairs[:, 1] << 12
    return (words[:, None] >> np.uint32([0, 8, 16])).astype(np.uint8).reshape(-1)[
        :-(-3 * offsets.size // 2)]


def chunks_unpack(data, count):
    """int64[count]: the offsets that `chunks_pack` wrote."""
    triples = np.zeros((-(-count // 2), 3), np.int64)
    triples.reshape(-1)[:data.size] = data
    words = triples @ np.int64([1, 1 << 8, 1 << 16])
    return np.stack([words & 0xFFF, words >> 12], axis=1).reshape(-1)[:count]


def chunks_levels(values):
    """(low, high, which values are in the upper half): both magnitudes of the 2-bit code.

    A magnitude above the mean of all is in the upper half; high and low are the means of their
    halves, 0 of an empty one. low is 0 also where a zero is among the values, so that zeros are
    said as zeros. Means are made of whole numbers, round(2^31 * magnitude / largest), so that they
    do not depend on the order of a sum.
    """
    sizes = np.abs(values).astype(np.float64)
    largest = sizes.max(initial=0)
    whole = np.rint(sizes * (WHOLE / largest if largest else 0.0)).astype(np.int64)
    above = whole * values.size > whole.sum()
    unit = largest * (1 / WHOLE)

    def mean(part):
        return np.float32(float(part.sum()) / float(max(part.size, 1)) * unit)

    low = mean(whole[~above]) if whole.all() else np.float32(0)
    return low, mean(whole[above]), above


def chunks_step(values):
    """float32: what an 8-bit code of 1 stands for, a 127th of the largest magnitude."""
    return min(np.abs(values).max(initial=np.float32(0)) / np.float32(127), MOST_STEP)


def chunks_encode(x, sizes, block, k, bits, data):
    """Fill `data`: floats, then the offsets of all blocks, then codes.

    2 bits: float32 (low, high) of each tensor; codes upper half << 1 | positive, four in a byte,
    the first in the lowest bits. 8 bits: float32 step of each tensor; codes int8 value / step.
    32 bits: float32 value of each kept element, and no codes. PacketError where one of them is not
    finite.
    """
    plan = chunks_plan(sizes, block, k)
    chosen = chunks_select(x, sizes, block, k)
    values = x[_kept(sizes, block, k)[1] + chosen]
    chunks_expect_finite(finite(values))
    floats, offsets, codes = _parts(data[:chunks_size(sizes, block, k, bits)], plan, bits)
    offsets[:] = chunks_pack(chosen)
    if bits == 32:
        floats[:] = values
        return
    found = np.zeros(-(-values.size // 4) * 4 if bits == 2 else values.size, np.uint8)
    for t, (first, last) in enumerate(zip(plan[:-1, 1], plan[1:, 1])):
        own = values[first:last]
        if bits == 8:
            floats[t] = chunks_step(own)
            steps = own / floats[t] if floats[t] else np.zeros_like(own)
            found[first:last] = np.clip(np.rint(steps), -127, 127).astype(np.int8).view(np.uint8)
        else:
            *floats[2 * t:2 * t + 2], above = chunks_levels(own)
            found[first:last] = above << 1 | (own > 0)
    if bits == 2:
        found = (found.reshape(-1, 4) << np.uint8([0, 2, 4, 6])).sum(axis=1, dtype=np.uint8)
    codes[:] = found


def chunks_expect_finite(yes) -> None:
    """PacketError unless `yes`: all that is to be sent is finite."""
    if not yes:
        raise PacketError("chunks: an element to be sent is not finite: what is owed and the "
                          "gradient together are beyond float32")


def chunks_encode_owed(grad, owed, out, sizes, block, k, bits, data):
    """`chunks_encode` of owed + grad; what is then still owed goes to `out`."""
    np.add(owed, grad, out=out)
    chunks_encode(out, sizes, block, k, bits, data)
    used = chunks_size(sizes, block, k, bits)
    chunks_decode_add(data[:used], sizes, block, k, bits, -1.0, out)


def chunks_decode_add(data, sizes, block, k, bits, weight, out):
    """out += weight * what is said of each element that is named."""
    plan = chunks_plan(sizes, block, k)
    floats, packed, codes = _parts(data, plan, bits)
    tensor, begin, size, number = _kept(sizes, block, k)
    offsets = chunks_unpack(packed, tensor.size)
    before = np.where(number == 0, -1, np.roll(offsets, 1))
    if (offsets >= size).any() or (offsets <= before).any():
        raise PacketError(f"chunks: offsets must ascend within each block of up to {block}")
    if bits == 32:
        if not finite(floats):
            raise PacketError("chunks: a value in the payload is not finite")
        said = floats
    elif bits == 8:
        within(floats, 0, MOST_STEP, _refuse_scale)
        steps = codes.view(np.int8)
        if (steps == -128).any():
            raise PacketError("chunks: codes from -127 to 127 expected, found -128")
        said = steps.astype(np.float32) * floats[tensor]
    else:
        within(floats, 0, np.finfo(np.float32).max, _refuse_scale)
        code = (codes[:, None] >> np.uint8([0, 2, 4, 6]) & 3).reshape(-1)[:tensor.size]
        level = floats[2 * tensor + (code >> 1)]
        said = np.where(code & 1, level, -level)
    out[begin + offsets] += np.float32(weight) * said


def _refuse_scale(floats):
    raise PacketError("chunks: scales that are finite and not negative expected, found "
                      f"{floats.min()} to {floats.max()}")


def chunks_decode_sum(payloads, sizes, block, k, bits, weight, out):
    """out = the sum of weight * what is said, over the payloads in their order."""
    out[...] = 0
    for data in payloads:
        chunks_decode_add(data, sizes, block, k, bits, weight, out)
