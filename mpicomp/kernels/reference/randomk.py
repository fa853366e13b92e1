"""One element of every run, drawn at random, in NumPy."""

import numpy as np

from mpicomp import philox
from mpicomp.errors import PacketError
from mpicomp.kernels.reference.sums import finite


def randomk_places(n, keep, key):
    """(int64[keep] elements, int64[keep] lengths): the element drawn from each of `keep` runs.

    Run j is elements j * n // keep to (j + 1) * n // keep - 1, at least one; its element is
    number (word j * length) // 2^32 of it.
    """
    borders = np.arange(keep + 1, dtype=np.int64) * n // max(keep, 1)
    lengths = np.diff(borders)
    draws = philox.words(key, 0, keep).astype(np.uint64) * lengths.astype(np.uint64)
    return borders[:-1] + (draws >> np.uint64(32)).astype(np.int64), lengths


def randomk_encode(x, keep, scale, key, data):
    """float32 value of the elements drawn; if `scale`, each times the length of its run."""
    places, lengths = randomk_places(x.size, keep, key)
    values = x[places]
    data[:4 * keep].view(np.float32)[:] = values * lengths.astype(np.float32) if scale else values


def randomk_decode_add(data, key, weight, out):
    """out += weight * value at the elements drawn."""
    values = data.view(np.float32)
    if not finite(values):
        raise PacketError("randomk: a value in the payload is not finite")
    places, _ = randomk_places(out.size, values.size, key)
    out[places] += np.float32(weight) * values
