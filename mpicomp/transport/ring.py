"""Sums and gathers around a ring of our own, where MPI's calls take longer (docs/results.md).

Large arrays go around in several lanes: while one's part waits or is added, the others' are on the
wire. A sum moves each byte 2 (P-1) / P times; every part is added up by one chain of ranks and then
passed on, so all ranks hold the same bits. A gather passes each packet on P - 1 times: nobody is
sent to by two ranks at once, which is what costs MPI's call a third of its time between nodes.

A ring is booked as the call that it stands for, since how bytes are passed on is MPI's business,
too. MPICOMP_RING=never leaves all to MPI.
"""

import os
from collections import deque

import numpy as np

RANKS = (2, 3, 4)  # sums: what was measured
LEAST = 1 << 20  # bytes of a sum below which MPI's own call has fewer rounds
GATHER = 1 << 18  # bytes of the longest packet, in the same sense
LANES = 8  # at most
SUM_LANE, GATHER_LANE = 1 << 20, 1 << 17  # bytes of a lane, at least


class Onward(list):
    """Requests between two ranks that belong to the posting before, for the pipeline's order."""


def allowed() -> bool:
    """May rings be used at all?"""
    return os.environ.get("MPICOMP_RING") != "never"


def suits(wire, payload, kind) -> bool:
    """Is this sum taken around the ring?"""
    return (allowed() and kind == "float32" and wire.size in RANKS and payload.nbytes >= LEAST)


def passes_on(wire, longest) -> bool:
    """Do packets of host memory, the longest of so many bytes, go around the ring?"""
    return wire.spread and longest >= GATHER and allowed()


def gather(wire, stage, index, send, receive, lengths, even=True):
    """Postings after which `receive` holds every rank's `send`, of `lengths` bytes, side by side.

    `even`: lengths are equal, and for MPI an Allgather will do.
    One call of MPI within a node, for short packets and for those of a GPU, else P - 1 rounds a
    lane.
    """
    longest = max(lengths)
    if not (passes_on(wire, longest) and isinstance(receive, np.ndarray)):
        yield [wire.allgather(stage, send, receive) if even else
               wire.allgatherv(stage, send, receive, lengths)]
        return
    wire.book("ring Iallgather", send.nbytes, sum(lengths) - send.nbytes)
    starts = [sum(lengths[:rank]) for rank in range(wire.size)]
    receive[starts[wire.rank]:][:send.nbytes] = send
    lanes = max(1, min(LANES, longest // GATHER_LANE))
    yield from _in_turn(_passed_on(wire, stage, index * lanes + k, receive,
                                   [_cut(a, n, k, lanes) for a, n in zip(starts, lengths)])
                        for k in range(lanes))


def _cut(start, length, k, parts):
    """Part k of so many, of `length` elements from `start` on."""
    return slice(start + length * k // parts, start + length * (k + 1) // parts)


def _passed_on(wire, stage, number, receive, parts):
    """One lane of a gather: part r of `receive` is there on rank r at first, then everywhere."""
    rank, size = wire.rank, wire.size
    for n in range(size - 1):
        tag = _tag(number, n, size)
        here, there = parts[(rank - n - 1) % size], parts[(rank - n) % size]
        yield [wire.receive(stage, receive[here], (rank - 1) % size, tag, booked=False),
               wire.send(stage, receive[there], (rank + 1) % size, tag, booked=False)]


def _in_turn(lanes):
    """One posting of all lanes, and how they go on: whichever was posted first comes next."""
    moving, kind = deque((lane, next(lane)) for lane in lanes), list
    while moving:
        lane, requests = moving.popleft()
        yield kind(requests)
        requests, kind = next(lane, None), Onward
        if requests is not None:
            moving.append((lane, requests))


class Ring:
    """Room in host memory for one bucket's sums: what arrives before it is added."""

    def __init__(self, wire, size):
        self.wire = wire
        lanes = max(1, min(LANES, 4 * size // SUM_LANE))
        self.lanes = [_Lane(wire, _cut(0, size, k, lanes)) for k in range(lanes)]

    def run(self, stage, index, send, receive):
        """One posting, then 2 (P - 1) rounds a lane: `receive` is the sum of all ranks' `send`."""
        self.wire.book("ring Iallreduce", send.nbytes, receive.nbytes)
        yield from _in_turn(lane.rounds(stage, index * len(self.lanes) + k, send, receive)
                            for k, lane in enumerate(self.lanes))


class _Lane:
    """Some elements of a sum, cut into a part for each rank."""

    def __init__(self, wire, place):
        self.wire, size = wire, place.stop - place.start
        self.parts = [_cut(place.start, size, k, wire.size) for k in range(wire.size)]
        self.incoming = np.zeros(max(part.stop - part.start for part in self.parts), np.float32)

    def rounds(self, stage, number, send, receive):
        """Yields the requests of one round after the other; `number` is the lane's own."""
        wire, rank, size = self.wire, self.wire.rank, self.wire.size
        after, before = (rank + 1) % size, (rank - 1) % size

        def part(array, k):
            return array[self.parts[k % size]]

        for n in range(size - 1):
            mine, own = part(receive if n else send, rank - n), part(send, rank - n - 1)
            arriving, tag = self.incoming[:own.size], _tag(number, n, size)
            yield [wire.receive(stage, arriving, before, tag, booked=False),
                   wire.send(stage, mine, after, tag, booked=False)]
            with np.errstate(all="ignore"):  # a gradient that is not finite: the header says so
                np.add(own, arriving, out=part(receive, rank - n - 1))
        for n in range(size - 1):
            tag = _tag(number, size - 1 + n, size)
            yield [wire.receive(stage, part(receive, rank - n), before, tag, booked=False),
                   wire.send(stage, part(receive, rank + 1 - n), after, tag, booked=False)]


def _tag(number, n, size):
    """Lanes and buckets overtake each other: every message has a tag of its own."""
    return (2 * (size - 1) * number + n) % 32768
