"""Ordered compaction: select words in each tile, scan the counts, move the words together."""

import numpy as np

from mpicomp.kernels.gpu import device

TILE = 4096  # elements that one block selects from: src/tiles.cuh


def tiles_of(n) -> int:
    """The tiles of n elements."""
    return -(-n // TILE)


def scanned(numbers, kernel="scan_sums"):
    """numbers[i] becomes the sum (scan_largest: the largest) of those before; returns all's."""
    total = device.current().zeros(1, np.int64)
    device.current().launch(kernel, device.THREADS if numbers.size else 0, numbers, numbers.size,
                            total)
    return total


def compact(n, select):
    """(room, counts scanned, total) of the words that select(room, counts) wrote to each tile.

    `room` has a place for every element of every tile, `total` is int64[1] on the device.
    """
    d, tiles = device.current(), tiles_of(n)
    words, counts = d.empty(tiles * TILE, np.uint32), d.empty(tiles, np.int64)
    select(words, counts)
    return words, counts, scanned(counts)


def gather(words, counts, total, data):
    """The selected words, in order, to the front of `data` (uint8)."""
    device.current().launch("gather_words", counts.size * device.THREADS, words, counts,
                            counts.size, total, data)
