"""Strom's threshold and its 32-bit words, in NumPy."""

import numpy as np

from mpicomp.errors import PacketError


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
