"""Packets whose length depends on the data, in one call where the last steps foretell the length.

Everybody sends a slot of the same size, header and as much payload as fits, and what did not fit
follows in a second call, to which everybody adds nothing where all fitted. All ranks see the same
headers, so all know the size of the next slot without a word. A slot that holds the header alone
is the exchange of lengths first: large packets travel so, because there the padding of a slot
costs more than a call.
"""

import numpy as np

from mpicomp.transport import packet, ring, staging

LIMIT = 32 << 10  # bytes of a slot beyond which lengths travel first; 0: always (docs/results.md)
STEP = 64  # slots are multiples of so many bytes: kernels read payloads as whole words


class Slot:
    """The agreed size of the next slot in bytes, header included; `most` is the largest packet."""

    def __init__(self, most):
        self.size, self.most = packet.SIZE, most - most % 4  # payloads begin at whole words

    @property
    def room(self):
        """Bytes of payload that a slot takes."""
        return self.size - packet.SIZE

    def wanted(self, longest):
        """The size for payloads like these: an eighth to spare; header alone beyond LIMIT."""
        whole = packet.SIZE + longest + longest // 8
        whole += -whole % STEP
        return whole if whole <= LIMIT else packet.SIZE

    def learn(self, wanted):
        """Take the wanted size at once if it is more, or means lengths first; else shrink slowly.

        `wanted` must be the same on all ranks.
        """
        if wanted > packet.SIZE:
            wanted = max(wanted, self.size - max(STEP, self.size // 16 // STEP * STEP))
        self.size = min(wanted, self.most)


def hint(size):
    """The size class of a wanted slot, for the upper byte of a header's flags: 0, header alone."""
    return 0 if size <= packet.SIZE else next(k for k in range(1, 256) if sized(k) >= size)


def sized(k):
    """The slot of size class k, four classes from one power of two to the next."""
    return packet.SIZE if k == 0 else STEP * -(-int(1000 * 2 ** ((k - 1) / 4)) // 1000)


class Joined:
    """Payloads that came in two parts, in memory that grows in the first steps."""

    def __init__(self, like):
        self.zeros = staging.rooms(like)
        self.slots, self.rest, self.joined = (self.zeros(0, np.uint8) for _ in range(3))

    def join(self, starts, lengths, room, rests):
        """Every rank's payload in one piece: in its slot, in what followed, or put together."""
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
        """`array`, or a larger one where it is too small."""
        return array if size <= array.size else self.zeros(size * 5 // 4, np.uint8)


class Gather(Joined):
    """All ranks' packets of one bucket on every rank: `run` leaves `headers` and `payloads`."""

    def __init__(self, wire, most, like):
        super().__init__(like)
        self.wire, self.slot = wire, Slot(most)
        self.headers, self.payloads = [], []

    def run(self, exchange, stage, index, outbox, used, most):
        """The postings of bucket `index`, at `stage` and `stage` + 1; a rank has `most` bytes.

        `outbox` is the packet with `used` bytes of payload, and memory up to the largest.
        """
        size, room, wire = self.slot.size, self.slot.room, self.wire
        wire.meter.move("padding", max(0, room - used))
        self.slots = self.grown(self.slots, size * wire.size)
        slots = self.slots[:size * wire.size]
        yield [wire.allgather(stage, outbox[:size], slots)]
        self.headers = exchange.read_headers(slots, range(0, slots.size, size))
        lengths = exchange.lengths(self.headers, most)
        rests = [max(0, length - room) for length in lengths]
        self.rest = self.grown(self.rest, sum(rests))
        if sum(rests):
            yield from ring.gather(wire, stage + 1, index, outbox[size:][:rests[wire.rank]],
                                   self.rest[:sum(rests)], rests, even=False)
        else:
            yield []  # a posting, too
        starts = range(packet.SIZE, slots.size + packet.SIZE, size)
        self.payloads = self.join(starts, lengths, room, rests)
        self.slot.learn(self.slot.wanted(max(lengths)))


class Scatter(Joined):
    """A packet for each rank on its rank: `run` leaves those for this one, in rank order.

    What did not fit into slots goes from rank to rank, since only those two know of it. Only the
    receivers see how long their packets were; each tells all others with its own next packet, in
    a byte of the header (`hint`), and `learn` takes the largest.
    """

    def __init__(self, wire, most, like):
        super().__init__(like)
        self.wire, self.slot = wire, Slot(max(most))
        self.most = most  # bytes of the largest packet for each rank
        self.headers, self.payloads, self.hint = [], [], 0

    def run(self, exchange, stage, outboxes, used):
        """Two postings, at `stage` and `stage` + 1, of a packet with `used` bytes for each rank."""
        wire, me = self.wire, self.wire.rank
        sizes = [min(self.slot.size, most - most % 4) for most in self.most]
        outbox, at = outboxes
        mine, room = sizes[me], sizes[me] - packet.SIZE
        self.slots = self.grown(self.slots, mine * wire.size)
        starts = range(0, mine * wire.size, mine)
        send, receive = list(sizes), [mine] * wire.size
        send[me] = receive[me] = 0
        wire.meter.move("padding", sum(max(0, size - packet.SIZE - n) for rank, (size, n)
                                       in enumerate(zip(sizes, used)) if rank != me))
        yield [wire.alltoallv(stage, (outbox, send, at), (self.slots, receive, starts))]
        self.slots[starts[me]:][:mine] = outbox[at[me]:][:mine]
        self.headers = exchange.read_headers(self.slots, starts)
        lengths = exchange.lengths(self.headers, [self.most[me] - packet.SIZE] * wire.size)
        rests = [max(0, length - room) for length in lengths]
        self.rest = self.grown(self.rest, sum(rests))
        requests, end = [], 0
        for rank in range(wire.size):
            there = max(0, used[rank] + packet.SIZE - sizes[rank])
            follows = outbox[at[rank] + sizes[rank]:][:there]
            place, end = self.rest[end:end + rests[rank]], end + rests[rank]
            if rank == me:
                place[...] = follows
                continue
            requests += [wire.receive(stage + 1, place, rank)] if place.size else []
            requests += [wire.send(stage + 1, follows, rank)] if there else []
        yield requests
        self.payloads = self.join([at + packet.SIZE for at in starts], lengths, room, rests)
        self.hint = hint(self.slot.wanted(max(lengths)))

    def learn(self, headers):
        """The next slot: the largest that an owner asked for, or lengths first if any asks it."""
        hints = [header.flags >> packet.HINT for header in headers]
        self.slot.learn(sized(max(hints)) if all(hints) else packet.SIZE)
