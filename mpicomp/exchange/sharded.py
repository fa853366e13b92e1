"""Sharded: each rank owns a part, gets it compressed from all ranks, and sends the sum compressed.

The exchange of 1-bit SGD (Seide 2014, section 3.1) and of Dryden 2016: traffic does not depend on
the number of ranks. Every element is quantised twice, and what a packet leaves out is kept both
times: "error" is what this rank has not told the owners, "error2" what this rank, as an owner, has
not told the others. Owners sum in rank order and apply what they sent, so replicas stay identical.
"""

from dataclasses import dataclass

import numpy as np

from mpicomp import kernels, philox
from mpicomp.compressors.options import option
from mpicomp.exchange.base import BucketExchange, Codec, Cost, Exchange, packet_size, to_agree
from mpicomp.exchange.shards import cut
from mpicomp.transport import packet, ring, staging
from mpicomp.transport.lengths import Gather, Scatter

SECOND = 1 << 32  # philox.part of the second quantisation; of the first: the owner


class Scales:
    """What the codecs of all shards measure, side by side, so that one call agrees on all of it."""

    def __init__(self, grad, codecs):
        self.codecs = codecs
        self.values = kernels.of(grad).zeros(sum(codec.shared.size for codec in codecs))
        self.asked, self.agreed = to_agree(grad, self.values)

    def _parts(self):
        at = 0
        for codec in self.codecs:
            yield codec, slice(at, at + codec.shared.size)
            at += codec.shared.size

    def measure(self, flags):
        """Fill `asked`."""
        for codec, part in self._parts():
            codec.measure(flags)
            self.values[part] = codec.shared
        staging.leave(self.asked)

    def hand_out(self):
        """Give each codec its part of `agreed`."""
        agreed = staging.arrive(self.agreed, now=True)
        for codec, part in self._parts():
            codec.shared[...] = agreed[part]


class History:
    """AdaGrad's sum of squares: `now`, and `ahead` as it is when the step has been applied."""

    def __init__(self, zeros, size):
        self.now, self.ahead = zeros(size), zeros(size)

    def swap(self):
        """The step was applied."""
        self.now, self.ahead = self.ahead, self.now


class ShardedBucket(BucketExchange):
    """P first codecs, one a shard, and the owner's second.

    flat  float32[layout.size]: the bucket in the order of the shards, of which codecs see parts
    """

    def __init__(self, exchange, compressor, layout, index, grad, plan, seed):
        self.exchange, zeros = exchange, kernels.of(grad).zeros
        self.shards, self.flat = cut(layout, exchange.wire.size), zeros(layout.size)
        self.outbox, self.out_starts, sizes = self._outboxes(compressor, grad)
        self.first, start = [], 0
        for owner, (shard, at) in enumerate(zip(self.shards, self.out_starts)):
            end = start + shard.layout.size
            self.first.append(Codec(compressor, shard.layout, index, self.flat[start:end], plan,
                                    philox.part(seed, owner), self.outbox[at:at + sizes[owner]]))
            start = end
        own = self.shards[self.rank].layout
        self.second = Codec(compressor, own, index, zeros(own.size), plan,
                            philox.part(seed, SECOND))
        super().__init__(layout, index, grad, [*self.first, self.second])
        self.history = History(zeros, own.size) if exchange.adagrad else None
        self.received = self.payloads = None
        self._take_buffers(exchange.wire, sizes)

    def _outboxes(self, compressor, grad):
        """(one outbox for all first packets, where each begins in it, and their sizes)."""
        sizes = [packet_size(compressor, shard.layout) for shard in self.shards]
        starts = [0]
        for size in sizes:
            end = starts[-1] + size
            starts.append(end + -end % 4)  # whole words, which a GPU must have
        whole = starts.pop()
        if compressor.fixed:  # MPI counts up to the last
            self.exchange.wire.fits(max(whole, (len(sizes) - 1) * max(sizes)))
        return staging.buffers_for(grad)(whole, "uint8"), starts, sizes

    def _take_buffers(self, wire, sizes):
        """Memory for what arrives, and for what ranks agree on."""
        zeros = staging.buffers_for(self.grad)
        if self.fixed:
            self.inbox = zeros(wire.size * sizes[self.rank], "uint8")
            self.result = zeros(sum(sizes), "uint8")
        else:
            self.scatter = Scatter(wire, sizes[self.rank], self.grad)
            self.gather_all = Gather(wire, self.grad)
        measured = [codec for codec in self.first if codec.shared is not None]
        self.scales = Scales(self.grad, measured) if measured else None

    @property
    def rank(self):
        return self.exchange.wire.rank

    @property
    def fixed(self):
        """Have all packets the length that the layout tells?"""
        return self.second.compressor.fixed

    def gather(self):
        """Bring the bucket into the order of the shards."""
        for shard, codec in zip(self.shards, self.first):
            shard.gather(self.grad, codec.grad)

    def reduce(self, step) -> int:
        """Sum what arrived for this rank's shard, in rank order; returns the flags to pass on."""
        headers, payloads = self.received
        flags = packet.NONFINITE if any(h.flags & packet.NONFINITE for h in headers) else 0
        if all(h.flags & packet.EMPTY for h in headers):
            flags |= packet.EMPTY
        if flags & packet.NONFINITE:
            return flags
        mine, total = self.first[self.rank], self.second.grad
        total[...] = 0
        with staging.decoding(total):
            for rank, payload in enumerate(payloads):
                if rank == self.rank and self.exchange.own == "raw":
                    total += mine.grad
                    continue
                mine.compressor.decode_add(payload, total, mine.layout, mine.key(step, rank), 1.0)
        if self.history is not None:
            kernels.of(total).adagrad(total, self.history.now, self.history.ahead)
        return flags

    def commit(self):
        for rank, codec in enumerate(self.first):
            if rank != self.rank or self.exchange.own != "raw":
                codec.commit()
        self.second.commit()
        if self.history is not None:
            self.history.swap()

    def persistent(self) -> dict:
        """{"error": first residuals, "error2": the owner's, zero elsewhere, "adagrad": ...}."""
        found = {}
        for shard, codec in zip(self.shards, self.first):
            self._collect(found, shard, codec.persistent())
        own = self.shards[self.rank]
        self._collect(found, own, {f"{k}2": v for k, v in self.second.persistent().items()})
        if self.history is not None:
            self._collect(found, own, {"adagrad": self.history.now})
        return found

    def _collect(self, found, shard, arrays):
        for kind, array in arrays.items():
            if kind not in found:
                found[kind] = kernels.of(self.grad).zeros(self.layout.size)
            shard.scatter(array, found[kind])

    def restore(self, arrays):
        arrays = self._within_reach({k: staging.fetched(a) for k, a in arrays.items()})
        arrays = {kind: staging.fitting(array, self.grad) for kind, array in arrays.items()}
        for shard, codec in zip(self.shards, self.first):
            for kind, array in codec.persistent().items():
                shard.gather(arrays[kind], array)
        own = self.shards[self.rank]
        for kind, array in self.second.persistent().items():
            own.gather(arrays[f"{kind}2"], array)
        if self.history is not None:
            own.gather(arrays["adagrad"], self.history.now)

    def _within_reach(self, arrays):
        """Move residuals where this cut of the bucket, over so many ranks, will use them.

        This rank still owes the second residual of elements that it no longer owns: it joins the
        first. With own="raw" the first residual of its own elements is never used, and joins the
        second. A state of this same cut stays as it is.
        """
        if "error2" not in arrays or self.history is not None:
            return arrays
        mine = np.zeros(self.layout.size, np.float32)
        own = self.shards[self.rank]
        own.scatter(np.ones(own.layout.size, np.float32), mine)
        moved = {kind: array.copy() for kind, array in arrays.items()}
        self._move(moved, "error2", "error", mine == 0)
        if self.exchange.own == "raw":
            self._move(moved, "error", "error2", mine != 0)
        return moved

    @staticmethod
    def _move(arrays, source, target, where):
        where = where & (arrays[source] != 0)
        arrays[target][where] += arrays[source][where]
        arrays[source][where] = 0


@dataclass(eq=False, repr=False)
class Sharded(Exchange):
    """Each rank sums a part; quantised twice, and traffic does not grow with the ranks.

    `own="raw"`: the owner adds its own gradient as it is (Dryden's code).

    `adagrad` divides the sum by sqrt(sum of its squares so far) + 1e-8 between the two
    quantisations, the best place for it by Seide 2014, table 3. The result is then a step for plain
    SGD, not a mean.
    """

    name = "sharded"
    bucket = ShardedBucket
    stages = 5
    on_device = True

    own: str = option("quantised", "how a rank's gradient reaches its own shard",
                      choices=("quantised", "raw"))
    adagrad: bool = option(False, "AdaGrad on the sum, between the two quantisations")

    @classmethod
    def cost(cls, ranks):
        """Copies: into the order of the shards, and back from the sum and from the packets."""
        return Cost(2 * (ranks - 1) / ranks, calls=2, encodes=1 + 1 / ranks, decodes=2,
                    copies_before=1, copies_after=2)

    @classmethod
    def keeps_history(cls, **options):
        return options["adagrad"]

    def run(self, bucket, step, flags):
        yield from self._to_owners(bucket, step, flags)
        flags = bucket.reduce(step) | flags & packet.JOINED
        yield from self._to_all(bucket, step, flags)

    def _to_owners(self, bucket, step, flags):
        """Every rank's packets to the owners of the shards."""
        from mpi4py import MPI

        with self.wire.meter.stage("encode"):
            bucket.gather()
        if bucket.scales is not None:
            with self.wire.meter.stage("encode"):
                bucket.scales.measure(flags)
            yield [self.wire.allreduce(0, bucket.scales.asked, bucket.scales.agreed, MPI.MAX)]
            bucket.scales.hand_out()
        me, size = self.wire.rank, self.wire.size
        with self.wire.meter.stage("encode"):
            used = [codec.encode(step, me, flags) for codec in bucket.first]
        for rank, codec in enumerate(bucket.first):
            self.book(codec, used[rank] if rank != me else 0)
        if bucket.fixed:
            send = [packet.SIZE + n for n in used]
            receive = [bucket.first[me].outbox.size] * size
            starts = [rank * receive[0] for rank in range(size)]
            send[me] = receive[me] = 0
            yield [self.wire.alltoallv(2, (bucket.outbox, send, bucket.out_starts),
                                       (bucket.inbox, receive, starts))]
            bucket.inbox[starts[me]:][:bucket.first[me].outbox.size] = bucket.first[me].outbox
            headers = self.read_headers(bucket.inbox, starts)
            bucket.received = headers, list(_payloads(bucket.inbox, headers, starts))
            return
        yield from bucket.scatter.run(self, 1, bucket.outbox, bucket.out_starts, used)
        bucket.received = bucket.scatter.headers, bucket.scatter.payloads

    def _to_all(self, bucket, step, flags):
        """Every owner's packet of its sum to all ranks."""
        if bucket.second.shared is not None:
            with self.wire.meter.stage("encode"):
                bucket.second.measure(flags)
        self.encode(bucket.second, step, flags)
        if bucket.fixed:
            lengths = [codec.outbox.size for codec in bucket.first]
            starts = [sum(lengths[:rank]) for rank in range(self.wire.size)]
            yield from ring.gather(self.wire, 4, bucket.index, bucket.second.outbox, bucket.result,
                                   lengths, even=False)
            bucket.headers = self.read_headers(bucket.result, starts)
            bucket.payloads = list(_payloads(bucket.result, bucket.headers, starts))
            return
        yield from bucket.gather_all.run(self, 3, bucket.index, bucket.second.outbox,
                                         [codec.payload.size for codec in bucket.first])
        bucket.headers, bucket.payloads = bucket.gather_all.headers, bucket.gather_all.payloads

    def decode(self, bucket, step, weight):
        bucket.flat[...] = 0
        weight = 1.0 if self.adagrad else weight
        with staging.decoding(bucket.grad):
            for rank, (codec, payload) in enumerate(zip(bucket.first, bucket.payloads)):
                key = bucket.second.key(step, rank)
                codec.compressor.decode_add(payload, codec.grad, codec.layout, key, weight)
        for shard, codec in zip(bucket.shards, bucket.first):
            shard.scatter(codec.grad, bucket.grad)


def _payloads(buffer, headers, starts):
    """What follows each of the headers at these offsets."""
    for header, at in zip(headers, starts):
        yield staging.arrive(buffer[at + packet.SIZE:][:header.length])
