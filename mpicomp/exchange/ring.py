"""The sum of an array over two or three ranks, around a ring: each byte travels 2 (P-1) / P times.

Open MPI's Iallreduce takes a ring from four ranks on; on two it moves twice, on three three times
as many bytes (docs/cluster.md). Every part is added up by one chain of ranks and then passed on,
so all ranks hold the same bits.
"""

import numpy as np

RANKS = (2, 3)
LEAST = 1 << 20  # bytes below which MPI's own call has fewer rounds


def suits(wire, payload, kind) -> bool:
    """Is this sum taken around the ring?"""
    return kind == "float32" and wire.size in RANKS and payload.nbytes >= LEAST


class Ring:
    """Room for one bucket's sums: what arrives before it is added."""

    def __init__(self, wire, size, zeros):
        self.wire = wire
        self.cuts = [size * k // wire.size for k in range(wire.size + 1)]
        self.incoming = zeros(max(b - a for a, b in zip(self.cuts, self.cuts[1:])))

    def run(self, stage, index, send, receive):
        """2 (P - 1) postings; `receive` (float32) is then the sum of every rank's `send`."""
        wire, rank, size = self.wire, self.wire.rank, self.wire.size
        after, before = (rank + 1) % size, (rank - 1) % size

        def part(array, k):
            k %= size
            return array[self.cuts[k]:self.cuts[k + 1]]

        for n in range(size - 1):
            mine, own = part(receive if n else send, rank - n), part(send, rank - n - 1)
            arriving, tag = self.incoming[:own.size], _tag(index, n, size)
            yield [wire.receive(stage, arriving, before, tag), wire.send(stage, mine, after, tag)]
            with np.errstate(all="ignore"):  # a gradient that is not finite: the header says so
                np.add(own, arriving, out=part(receive, rank - n - 1))
        for n in range(size - 1):
            tag = _tag(index, size - 1 + n, size)
            yield [wire.receive(stage, part(receive, rank - n), before, tag),
                   wire.send(stage, part(receive, rank + 1 - n), after, tag)]


def _tag(index, n, size):
    """Buckets overtake each other: every message has a tag of its own."""
    return (2 * (size - 1) * index + n) % 32768
