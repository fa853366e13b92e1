"""Ring allreduce and ring allgather, used where they beat MPI's own (docs/results.md).

A large array is cut into lanes: while one lane waits or adds, the others send. A sum moves each
byte 2 (P-1) / P times; each part is added up along one chain of ranks and then passed on, so all
ranks hold the same bits. A gather passes each packet on P - 1 times, and no rank receives from two
ranks at once, which costs MPI's call a third of its time between nodes.

A ring is booked as the MPI call that it replaces, since the bytes that MPI moves inside a call are
not counted either. MPICOMP_RING=never turns rings off.
"""

import os
from collections import deque

import numpy as np

RANKS = (2, 3, 4)  # sums: the numbers of ranks that were measured
LEAST = 1 << 20  # bytes of a sum; below, MPI's own call has fewer rounds
GATHER = 1 << 18  # bytes of the longest packet of a gather; below, the same
LANES = 8  # at most
SUM_LANE, GATHER_LANE = 1 << 20, 1 << 17  # bytes of a lane, at least


class SameCall(list):
    """Point-to-point requests inside one collective; the pipeline does not count them as a new
    posting."""


def allowed() -> bool:
    """Are rings turned on?"""
    return os.environ.get("MPICOMP_RING") != "never"


def suits(calls, payload, kind) -> bool:
    """Does this sum use the ring?"""
    return (allowed() and kind == "float32" and calls.size in RANKS and payload.nbytes >= LEAST)


def passes_on(calls, longest) -> bool:
    """Does a gather of packets in host memory, the longest of `longest` bytes, use the ring?"""
    return calls.spread and longest >= GATHER and allowed()


def gather(calls, stage, index, send, receive, lengths, even=True):
    """Yields the requests that gather every rank's `send`, of `lengths` bytes, into `receive`.

    `even`: all lengths are equal, so that MPI's Allgather will do. One MPI call within a node, for
    short packets and for device buffers; else P - 1 rounds per lane.
    """
    longest = max(lengths)
    if not (passes_on(calls, longest) and isinstance(receive, np.ndarray)):
        yield [calls.allgather(stage, send, receive) if even else
               calls.allgatherv(stage, send, receive, lengths)]
        return
    calls.book("ring Iallgather", send.nbytes, sum(lengths) - send.nbytes)
    starts = [sum(lengths[:rank]) for rank in range(calls.size)]
    receive[starts[calls.rank]:][:send.nbytes] = send
    lanes = max(1, min(LANES, longest // GATHER_LANE))
    yield from _in_turn(_passed_on(calls, stage, index * lanes + k, receive,
                                   [_cut(a, n, k, lanes) for a, n in zip(starts, lengths)])
                        for k in range(lanes))


def _cut(start, length, k, parts):
    """Part k of `parts` of the `length` elements from `start` on, as a slice."""
    return slice(start + length * k // parts, start + length * (k + 1) // parts)


def _passed_on(calls, stage, number, receive, parts):
    """One lane of a gather: rank r holds part r of `receive` at first, at the end all parts."""
    rank, size = calls.rank, calls.size
    for n in range(size - 1):
        tag = _tag(number, n, size)
        here, there = parts[(rank - n - 1) % size], parts[(rank - n) % size]
        yield [calls.receive(stage, receive[here], (rank - 1) % size, tag, booked=False),
               calls.send(stage, receive[there], (rank + 1) % size, tag, booked=False)]


def _in_turn(lanes):
    """Yields the requests of all lanes as one posting, resuming lanes in the order of posting."""
    moving, kind = deque((lane, next(lane)) for lane in lanes), list
    while moving:
        lane, requests = moving.popleft()
        yield kind(requests)
        requests, kind = next(lane, None), SameCall
        if requests is not None:
            moving.append((lane, requests))


class Ring:
    """One bucket's ring allreduce, with host memory for what arrives before it is added."""

    def __init__(self, calls, size):
        self.calls = calls
        lanes = max(1, min(LANES, 4 * size // SUM_LANE))
        self.lanes = [_Lane(calls, _cut(0, size, k, lanes)) for k in range(lanes)]

    def run(self, stage, index, send, receive):
        """One posting, then 2 (P - 1) rounds per lane: sums all ranks' `send` into `receive`."""
        self.calls.book("ring Iallreduce", send.nbytes, receive.nbytes)
        yield from _in_turn(lane.rounds(stage, index * len(self.lanes) + k, send, receive)
                            for k, lane in enumerate(self.lanes))


class _Lane:
    """A slice of a sum's elements, cut into one part per rank."""

    def __init__(self, calls, place):
        self.calls, size = calls, place.stop - place.start
        self.parts = [_cut(place.start, size, k, calls.size) for k in range(calls.size)]
        self.incoming = np.zeros(max(part.stop - part.start for part in self.parts), np.float32)

    def rounds(self, stage, number, send, receive):
        """Yields the requests of each round; `number` is unique to this bucket and lane."""
        calls, rank, size = self.calls, self.calls.rank, self.calls.size
        after, before = (rank + 1) % size, (rank - 1) % size

        def part(array, k):
            return array[self.parts[k % size]]

        for n in range(size - 1):
            mine, own = part(receive if n else send, rank - n), part(send, rank - n - 1)
            arriving, tag = self.incoming[:own.size], _tag(number, n, size)
            yield [calls.receive(stage, arriving, before, tag, booked=False),
                   calls.send(stage, mine, after, tag, booked=False)]
            with np.errstate(all="ignore"):  # the header says if a gradient is not finite
                np.add(own, arriving, out=part(receive, rank - n - 1))
        for n in range(size - 1):
            tag = _tag(number, size - 1 + n, size)
            yield [calls.receive(stage, part(receive, rank - n), before, tag, booked=False),
                   calls.send(stage, part(receive, rank + 1 - n), after, tag, booked=False)]


def _tag(number, n, size):
    """A tag for each message, since lanes and buckets overtake each other."""
    return (2 * (size - 1) * number + n) % 32768
