"""Exchanges packets of data-dependent length in one call, if the last steps predict the length.

Every rank sends a fixed-size slot, with the header and as much payload as fits; whatever did not
fit follows in a second call. All ranks see all headers, so they derive the next slot size without
communicating. For large packets the slot holds the header alone, so that lengths travel first:
there the padding of a slot would cost more than a call.
"""

import numpy as np

from mpicomp.transport import packet, ring, staging

LIMIT = 32 << 10  # bytes of the largest slot; beyond, lengths travel first (docs/results.md)
STEP = 64  # bytes; slots are multiples of it, since kernels read payloads as whole words


class SlotSize:
    """The size of the next slot in bytes, with header; `most` is that of the largest packet."""

    def __init__(self, most):
        self.size, self.most = packet.SIZE, most - most % 4  # payloads begin at whole words

    @property
    def room(self):
        """Bytes of payload that fit into a slot."""
        return self.size - packet.SIZE

    def wanted(self, longest):
        """The size for a payload of `longest` bytes and an eighth; header alone beyond LIMIT."""
        whole = packet.SIZE + longest + longest // 8
        whole += -whole % STEP
        return whole if whole <= LIMIT else packet.SIZE

    def learn(self, wanted):
        """Grow to `wanted` at once, as well as shrink to the header alone; else shrink slowly.

        `wanted` must be the same on all ranks.
        """
        if wanted > packet.SIZE:
            wanted = max(wanted, self.size - max(STEP, self.size // 16 // STEP * STEP))
        self.size = min(wanted, self.most)


def hint(size):
    """The size class of a slot, for the upper byte of a header's flags; 0: header alone."""
    return 0 if size <= packet.SIZE else next(k for k in range(1, 256) if sized(k) >= size)


def sized(k):
    """Bytes of a slot of size class k; four classes per power of two."""
    return packet.SIZE if k == 0 else STEP * -(-int(1000 * 2 ** ((k - 1) / 4)) // 1000)


class SplitPayloads:
    """Joins payloads that arrived in two parts, in buffers that grow during the first steps."""

    def __init__(self, like):
        self.zeros = staging.buffers_for(like)
        self.slots, self.rest, self.joined = (self.zeros(0, np.uint8) for _ in range(3))

    def join(self, starts, lengths, room, rests):
        """Every rank's payload in one piece: in its slot, in the rest, or joined from both.

        `lengths` are those of the payloads, of which `rests` did not fit into slots of `room`.
        """
        self.joined = self.grown(self.joined, sum(n for n, r in zip(lengths, rests) if r and room))
        payloads, at, free = [], 0, 0
        for start, length, more in zip(starts, lengths, rests):
            whole = self.slots[start:start + length]
            if more and not room:
                whole = self.rest[at:at + more]
            elif more:
                whole, free = self.joined[free:free + length], free + length
                whole[:room], whole[room:] = (self.slots[start:start + room],
                                              self.rest[at:at + more])
            at += more
            payloads.append(staging.arrive(whole))
        return payloads

    def grown(self, array, size):
        """`array`, or a new and larger one if it has fewer than `size` bytes."""
        return array if size <= array.size else self.zeros(size * 5 // 4, np.uint8)


class Gather(SplitPayloads):
    """Sends every rank's packet of one bucket to all ranks: `run` sets `headers`, `payloads`."""

    def __init__(self, calls, most, like):
        super().__init__(like)
        self.calls, self.slot = calls, SlotSize(most)
        self.headers, self.payloads = [], []

    def run(self, exchange, stage, index, outbox, used, most):
        """Two postings of bucket `index`, at `stage` and `stage` + 1.

        `outbox` holds the packet, with `used` bytes of payload, and has the size of the largest;
        `most` are the largest lengths that the ranks' payloads may have.
        """
        size, room, calls = self.slot.size, self.slot.room, self.calls
        calls.meter.move("padding", max(0, room - used))
        self.slots = self.grown(self.slots, size * calls.size)
        slots = self.slots[:size * calls.size]
        yield [calls.allgather(stage, outbox[:size], slots)]
        self.headers = exchange.read_headers(slots, range(0, slots.size, size))
        lengths = exchange.lengths(self.headers, most)
        rests = [max(0, length - room) for length in lengths]
        self.rest = self.grown(self.rest, sum(rests))
        if sum(rests):
            yield from ring.gather(calls, stage + 1, index, outbox[size:][:rests[calls.rank]],
                                   self.rest[:sum(rests)], rests, even=False)
        else:
            yield []  # counts as a posting
        starts = range(packet.SIZE, slots.size + packet.SIZE, size)
        self.payloads = self.join(starts, lengths, room, rests)
        self.slot.learn(self.slot.wanted(max(lengths)))


class Scatter(SplitPayloads):
    """Sends one packet to each rank; afterwards `payloads` holds the packets this rank received,
    in rank order.

    What did not fit into a slot follows point to point, since only sender and receiver know of it.
    A rank sees only the lengths of the packets that it received; it sends the size class that it
    wants (`hint`) in the header of its next packet to all, and `learn` takes the largest.
    """

    def __init__(self, calls, most, like):
        super().__init__(like)
        self.calls, self.slot = calls, SlotSize(max(most))
        self.most = most  # bytes of the largest packet for each rank
        self.headers, self.payloads, self.hint = [], [], 0

    def run(self, exchange, stage, outboxes, used):
        """Two postings, at `stage` and `stage` + 1; `outboxes` is (array, start of each packet).

        `used` has the bytes of payload of the packet for each rank.
        """
        calls, me = self.calls, self.calls.rank
        sizes = [min(self.slot.size, most - most % 4) for most in self.most]
        outbox, at = outboxes
        mine, room = sizes[me], sizes[me] - packet.SIZE
        self.slots = self.grown(self.slots, mine * calls.size)
        starts = range(0, mine * calls.size, mine)
        send, receive = list(sizes), [mine] * calls.size
        send[me] = receive[me] = 0
        calls.meter.move("padding", sum(max(0, size - packet.SIZE - n) for rank, (size, n)
                                       in enumerate(zip(sizes, used)) if rank != me))
        yield [calls.alltoallv(stage, (outbox, send, at), (self.slots, receive, starts))]
        self.slots[starts[me]:][:mine] = outbox[at[me]:][:mine]
        self.headers = exchange.read_headers(self.slots, starts)
        lengths = exchange.lengths(self.headers, [self.most[me] - packet.SIZE] * calls.size)
        rests = [max(0, length - room) for length in lengths]
        self.rest = self.grown(self.rest, sum(rests))
        requests, end = [], 0
        for rank in range(calls.size):
            there = max(0, used[rank] + packet.SIZE - sizes[rank])
            follows = outbox[at[rank] + sizes[rank]:][:there]
            place, end = self.rest[end:end + rests[rank]], end + rests[rank]
            if rank == me:
                place[...] = follows
                continue
            requests += [calls.receive(stage + 1, place, rank)] if place.size else []
            requests += [calls.send(stage + 1, follows, rank)] if there else []
        yield requests
        self.payloads = self.join([at + packet.SIZE for at in starts], lengths, room, rests)
        self.hint = hint(self.slot.wanted(max(lengths)))

    def learn(self, headers):
        """Take the largest size that an owner asks for, or lengths first if any asks for that."""
        hints = [header.flags >> packet.HINT for header in headers]
        self.slot.learn(sized(max(hints)) if all(hints) else packet.SIZE)
