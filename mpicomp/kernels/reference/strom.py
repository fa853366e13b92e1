"""Strom's threshold, fixed or adapted, its 32-bit words and MXNet's two bits, in NumPy."""

import numpy as np

from mpicomp.errors import PacketError
from mpicomp.kernels.reference.sums import sample, total

SAMPLE = 100_000  # magnitudes from which tau is taken


def strom_sent(x, tau, strict):
    """The indices of all |x| > tau, or >= tau if not strict."""
    tau = np.float32(tau)
    size = np.abs(x)
    return np.flatnonzero(size > tau if strict else size >= tau)


def strom_encode(x, tau, strict, data) -> int:
    """One word index << 1 | (x > 0) for each element that `strom_sent` names; returns the bytes."""
    sent = strom_sent(x, tau, strict)
    words = sent.astype(np.uint32) << 1 | (x[sent] > 0)
    data[:4 * words.size].view(np.uint32)[:] = words
    return 4 * words.size


def strom_decode_add(data, tau, weight, out):
    """out += +-(weight * tau) at the indices named, which must ascend."""
    words = data.view(np.uint32)
    index = (words >> 1).astype(np.int64)
    if index.size and (index[-1] >= out.size or (np.diff(index) <= 0).any()):
        raise PacketError(f"strom: indices must ascend and stay below {out.size}")
    quantum = np.float32(weight) * np.float32(tau)
    out[index] += np.where(words & 1, quantum, -quantum)


def strom_encode_owed(grad, owed, out, tau, strict, data) -> int:
    """`strom_encode` of owed + grad; what is then still owed goes to `out`, which may be `owed`."""
    np.add(owed, grad, out=out)
    used = strom_encode(out, tau, strict, data)
    strom_decode_add(data[:used], tau, -1.0, out)
    return used


def strom_decode_sum(payloads, tau, weight, out):
    """out = the sum of +-(weight * tau) at the indices named, over the payloads in their order."""
    out[...] = 0
    for data in payloads:
        strom_decode_add(data, tau, weight, out)


def strom_tau(x, density):
    """The tau beyond which about a fraction `density` of x lies, at least one element.

    A sample of S = min(100000, n) magnitudes, spread over all of them (`sums.sample`), in
    ascending order: tau lies just below number min(S - 1, int(S * (1 - density))), so that this
    one is beyond it, strictly.
    Where that is 0 (a sparse gradient), just below the mean of the magnitudes that are not. 0 for
    a gradient of zeros, which says nothing.
    """
    if not x.size:
        return np.float32(0)
    size = min(SAMPLE, x.size)
    number = min(size - 1, int(size * (1 - density)))
    magnitudes = np.abs(x if size == x.size else x[sample(x.size, size)])
    reached = np.partition(magnitudes, number)[number]
    if reached == 0:
        magnitudes = np.abs(x[x != 0])
        if not magnitudes.size:
            return np.float32(0)
        with np.errstate(over="ignore"):
            reached = min(total(magnitudes) / np.float32(magnitudes.size), magnitudes.max())
    return np.nextafter(reached, np.float32(0))


def strom_2bit_encode(x, tau, strict, data) -> int:
    """Two bits an element: 11 = +tau, 10 = -tau, 00 = nothing; returns the bytes.

    Byte j holds elements 4j ... 4j+3, the first in the highest bits (MXNet); 0 fills `data` up.
    """
    sent = strom_sent(x, tau, strict)
    codes = np.zeros(4 * data.size, np.uint8)
    codes[sent] = 2 | (x[sent] > 0)
    first, second, third, fourth = codes.reshape(-1, 4).T
    data[:] = first << 6 | second << 4 | third << 2 | fourth
    return data.size


def strom_2bit_decode_add(data, tau, weight, out):
    """out += +-(weight * tau) where the code says so."""
    codes = (data[:, None] >> np.array([6, 4, 2, 0], np.uint8) & 3).reshape(-1)
    if (codes == 1).any() or codes[out.size:].any():
        raise PacketError("strom: the codes 00, 10 and 11 expected, and 00 behind the last element")
    quantum = np.float32(weight) * np.float32(tau)
    sent = np.flatnonzero(codes)
    out[sent] += np.where(codes[sent] == 3, quantum, -quantum)
