"""Exchanges packets whose lengths depend on the data: headers first, which say what follows."""

import numpy as np

from mpicomp.transport import packet, ring, staging


class Inbox:
    """Memory for the headers of all ranks, and for payloads: it grows with the longest so far.

    After each `run` of a subclass `headers` and `payloads` are those that arrived, in rank order.
    """

    def __init__(self, calls, like):
        self.calls, self._zeros = calls, staging.buffers_for(like)
        self._heads = self._zeros(packet.SIZE * calls.size, np.uint8)
        self._starts = range(0, self._heads.size, packet.SIZE)
        self._rest = self._zeros(0, np.uint8)
        self.headers, self.payloads = [], []

    def _places(self, lengths):
        """Where payloads of these lengths go, side by side: an array for each."""
        if sum(lengths) > self._rest.size:
            self._rest = self._zeros(sum(lengths) * 5 // 4, np.uint8)
        ends = np.cumsum(lengths).tolist()
        return [self._rest[end - length:end] for length, end in zip(lengths, ends)]


class Gather(Inbox):
    """Sends every rank's packet of one bucket to all ranks."""

    def run(self, exchange, stage, index, outbox, most):
        """Two postings of bucket `index`, at `stage` and `stage` + 1.

        `outbox` begins with the packet; `most` are the largest lengths that the ranks' payloads may
        have.
        """
        calls, size = self.calls, packet.SIZE
        yield [calls.allgather(stage, outbox[:size], self._heads)]
        self.headers = exchange.read_headers(self._heads, self._starts)
        lengths = exchange.lengths(self.headers, most)
        places = self._places(lengths)
        if sum(lengths):
            yield from ring.gather(calls, stage + 1, index, outbox[size:][:lengths[calls.rank]],
                                   self._rest[:sum(lengths)], lengths, even=False)
        else:
            yield []  # counts as a posting
        self.payloads = [staging.arrive(place) for place in places]


class Scatter(Inbox):
    """Sends one packet to each rank, of which this one gets none longer than `most` bytes."""

    def __init__(self, calls, most, like):
        super().__init__(calls, like)
        self.most = most

    def run(self, exchange, stage, outbox, starts, used):
        """Two postings, at `stage` and `stage` + 1; the packet for each rank begins at `starts`.

        `used` has the bytes of payload of each. Payloads go point to point, since only sender and
        receiver know of them.
        """
        calls, me, size = self.calls, self.calls.rank, packet.SIZE
        one_each = [size * (rank != me) for rank in range(calls.size)]
        yield [calls.alltoallv(stage, (outbox, one_each, starts),
                               (self._heads, one_each, self._starts))]
        self._heads[size * me:][:size] = outbox[starts[me]:][:size]
        self.headers = exchange.read_headers(self._heads, self._starts)
        lengths = exchange.lengths(self.headers, [self.most - size] * calls.size)
        requests, places = [], self._places(lengths)
        for rank, place in enumerate(places):
            payload = outbox[starts[rank] + size:][:used[rank]]
            if rank == me:
                place[...] = payload
                continue
            requests += [calls.receive(stage + 1, place, rank)] if place.size else []
            requests += [calls.send(stage + 1, payload, rank)] if payload.size else []
        yield requests
        self.payloads = [staging.arrive(place) for place in places]
