"""Gradient dropping: the cut from a sample, and indices with values or signs, in NumPy."""

import numpy as np

from mpicomp.errors import PacketError
from mpicomp.kernels.reference.sums import finite, sample, total

MARIAN = -1  # as `draws` of dropping_cut: Marian's sample


def dropping_sample(n, rate, draws, first_version=False):
    """(S, span, number): the cut of n elements is number `number` of S magnitudes (`sample`).

    S = min(draws, n), spread over all elements; draws = 0: all of them; MARIAN: min(100000, n) at
    the stride n // S, as Marian takes them. number = max(0, int(S * rate) - 1) in ascending order,
    in Marian's first versions, until June 2017, min(int(S * rate), S - 1). S * rate is a product
    of float32, as there.
    """
    size = min(100_000 if draws == MARIAN else draws, n) if draws else n
    place = int(np.float32(size) * np.float32(rate))
    number = min(place, size - 1) if first_version else max(0, min(place, size) - 1)
    return size, size * (n // size) if draws == MARIAN else n, number


def dropping_cut(x, rate, draws, first_version=False):
    """The magnitude that a fraction `rate` of a sample of |x| does not exceed.

    `dropping_sample` says which sample. A single element has the cut 0: it would never exceed
    itself.
    """
    if x.size < 2:
        return np.float32(0)
    size, span, number = dropping_sample(x.size, rate, draws, first_version)
    magnitudes = np.abs(x if size == x.size else x[sample(x.size, size, span)])
    return np.partition(magnitudes, number)[number]


def dropping_select(x, cut, start, data) -> int:
    """int32 start + i for each |x[i]| > cut at the front of `data`; returns how many."""
    sent = np.flatnonzero(np.abs(x) > cut)
    data[:4 * sent.size].view(np.int32)[:] = sent + start
    return sent.size


def dropping_values(x, count, data):
    """float32 x[index] behind the `count` indices at the front of `data`."""
    index = data[:4 * count].view(np.int32)
    data[4 * count:8 * count].view(np.float32)[:] = x[index]


def dropping_decode_add(data, weight, out):
    """out += weight * value at the indices named, which must ascend."""
    count = data.size // 8
    index = data[:4 * count].view(np.int32).astype(np.int64)
    values = data[4 * count:].view(np.float32)
    if count and (index[0] < 0 or index[-1] >= out.size or (np.diff(index) <= 0).any()):
        raise PacketError(f"dropping: indices must ascend and stay below {out.size}")
    if not finite(values):
        raise PacketError("dropping: a value in the payload is not finite")
    out[index] += np.float32(weight) * values


def dropping_encode_owed(grad, owed, out, scopes, rate, draws, data) -> int:
    """Cut, indices and values of owed + grad; what is then still owed goes to `out`.

    `scopes` are the (start, stop) that have a cut of their own; `data` has 8 * n bytes. Returns
    the bytes used.
    """
    np.add(owed, grad, out=out)
    count = 0
    for start, stop in scopes:
        cut = dropping_cut(out[start:stop], rate, draws)
        count += dropping_select(out[start:stop], cut, start, data[4 * count:])
    dropping_values(out, count, data)
    dropping_decode_add(data[:8 * count], -1.0, out)
    return 8 * count


def dropping_decode_sum(payloads, weight, out):
    """out = the sum of weight * value at the indices named, over the payloads in their order."""
    out[...] = 0
    for data in payloads:
        dropping_decode_add(data, weight, out)


def dropping_signs(x, cut, start, means, data) -> int:
    """uint32 (start + i) << 1 | (x[i] > 0) for each |x[i]| > cut; returns how many.

    means = the mean of the negative and of the positive ones of these, 0 where there are none;
    sums follow `sums.total` over the elements sent, in ascending order.
    """
    sent = np.flatnonzero(np.abs(x) > cut)
    values = x[sent]
    for side, kept in enumerate((values[values < 0], values[values > 0])):
        means[side] = total(kept) / np.float32(max(kept.size, 1))
    words = (sent + start).astype(np.uint32) << 1 | (values > 0)
    data[:4 * sent.size].view(np.uint32)[:] = words
    return sent.size


def dropping_signs_encode(x, scopes, rate, draws, first_version, data) -> int:
    """float32 means[scopes][2], then the words of all scopes, (start, stop); returns the bytes."""
    used = 8 * len(scopes)
    means = data[:used].view(np.float32).reshape(-1, 2)
    for own, (start, stop) in zip(means, scopes):
        cut = dropping_cut(x[start:stop], rate, draws, first_version)
        used += 4 * dropping_signs(x[start:stop], cut, start, own, data[used:])
    return used


def dropping_signs_decode_add(data, means, starts, weight, out):
    """out += weight * the mean of the word's sign in its scope; scope i begins at starts[i]."""
    words = data.view(np.uint32)
    index = (words >> 1).astype(np.int64)
    if index.size and (index[-1] >= out.size or (np.diff(index) <= 0).any()):
        raise PacketError(f"dropping: indices must ascend and stay below {out.size}")
    if not finite(means):
        raise PacketError("dropping: a mean in the payload is not finite")
    scope = np.searchsorted(starts, index, side="right") - 1
    out[index] += (means * np.float32(weight)).reshape(-1, 2)[scope, words & 1]
