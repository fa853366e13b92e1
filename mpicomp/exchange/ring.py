"""The sum of an array over a few ranks, around a ring: each byte travels 2 (P-1) / P times.

On two ranks Open MPI's Iallreduce moves twice as many bytes, on three three times as many, on four
it waits while it adds (docs/results.md). Every part is added up by one chain of ranks and then passed on, so all ranks
hold the same bits. A large array goes around in several lanes: while one's part is added, the
others' are on the wire.
"""

from collections import deque

import numpy as np

RANKS = (2, 3, 4)  # what was measured, docs/results.md
LEAST = 1 << 20  # bytes below which MPI's own call has fewer rounds
LANES, LANE = 8, 1 << 20  # at most so many lanes, of at least so many bytes


def suits(wire, payload, kind) -> bool:
    """Is this sum taken around the ring?"""
    return kind == "float32" and wire.size in RANKS and payload.nbytes >= LEAST


class Ring:
    """Room for one bucket's sums: what arrives before it is added."""

    def __init__(self, wire, size, zeros):
        lanes = max(1, min(LANES, 4 * size // LANE))
        borders = [size * k // lanes for k in range(lanes + 1)]
        self.lanes = [_Lane(wire, start, stop, zeros)
                      for start, stop in zip(borders, borders[1:])]

    def run(self, stage, index, send, receive):
        """2 (P - 1) postings a lane; `receive` (float32) is then the sum of every rank's `send`."""
        moving = deque()
        for k, lane in enumerate(self.lanes):
            rounds = lane.rounds(stage, index * len(self.lanes) + k, send, receive)
            moving.append((rounds, next(rounds)))
        while moving:
            rounds, requests = moving.popleft()
            yield requests
            requests = next(rounds, None)
            if requests is not None:
                moving.append((rounds, requests))


class _Lane:
    """Elements start ... stop - 1, cut into a part for each rank."""

    def __init__(self, wire, start, stop, zeros):
        self.wire = wire
        self.cuts = [start + (stop - start) * k // wire.size for k in range(wire.size + 1)]
        self.incoming = zeros(max(b - a for a, b in zip(self.cuts, self.cuts[1:])))

    def rounds(self, stage, number, send, receive):
        """Yields the requests of one round after the other; `number` is the lane's own."""
        wire, rank, size = self.wire, self.wire.rank, self.wire.size
        after, before = (rank + 1) % size, (rank - 1) % size

        def part(array, k):
            k %= size
            return array[self.cuts[k]:self.cuts[k + 1]]

        for n in range(size - 1):
            mine, own = part(receive if n else send, rank - n), part(send, rank - n - 1)
            arriving, tag = self.incoming[:own.size], _tag(number, n, size)
            yield [wire.receive(stage, arriving, before, tag), wire.send(stage, mine, after, tag)]
            with np.errstate(all="ignore"):  # a gradient that is not finite: the header says so
                np.add(own, arriving, out=part(receive, rank - n - 1))
        for n in range(size - 1):
            tag = _tag(number, size - 1 + n, size)
            yield [wire.receive(stage, part(receive, rank - n), before, tag),
                   wire.send(stage, part(receive, rank + 1 - n), after, tag)]


def _tag(number, n, size):
    """Lanes and buckets overtake each other: every message has a tag of its own."""
    return (2 * (size - 1) * number + n) % 32768
