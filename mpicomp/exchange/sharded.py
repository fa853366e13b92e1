"""Sharded: each rank owns a part, gets it compressed from all, and sends the sum compressed.

The exchange of 1-bit SGD (Seide 2014, section 3.1) and of Dryden 2016: traffic does not depend on
the number of ranks. Every element is quantised twice, and each time what was not said is kept:
"error" is what this rank has not told the owners, "error2" what this rank as an owner has not told
the others. Owners sum in rank order and apply what they sent, so replicas stay bit-identical.
"""

import numpy as np

from mpicomp import kernels, philox
from mpicomp.exchange.base import Exchange, Mail, to_agree
from mpicomp.exchange.shards import cut
from mpicomp.transport import packet, ring, staging
from mpicomp.transport.slots import Gather, Scatter

SECOND = 1 << 32  # the part whose random numbers are the second quantisation's; first: the owner


class Sharded(Exchange):
    """See the module. `own="raw"`: the owner adds its own gradient as it is (Dryden's code).

    `adagrad` divides the sum by sqrt(sum of its squares so far) + 1e-8 between the two
    quantisations, the best place for it by Seide 2014, table 3; what arrives is then a step
    for plain SGD, not a mean.
    """

    stages = 5

    def __init__(self, wire, own="quantised", adagrad=False):
        super().__init__(wire)
        self.own, self.adagrad = own, adagrad

    def open(self, compressor, layout, index, grad, plan, seed):
        return _Bucket(self, compressor, layout, index, grad, plan, seed)

    def run(self, mail, step, flags):
        yield from self._to_owners(mail, step, flags)
        flags = mail.reduce(step) | flags & packet.JOINED
        yield from self._to_all(mail, step, flags)

    def _to_owners(self, mail, step, flags):
        """Every rank's packets to the owners of the shards."""
        from mpi4py import MPI

        with self.wire.meter.stage("encode"):
            mail.gather()
        if mail.shared is not None:
            with self.wire.meter.stage("encode"):
                for shard_mail, part in mail.shared_parts():
                    shard_mail.measure(flags)
                    mail.shared[part] = shard_mail.shared
                staging.leave(mail.asked)
            yield [self.wire.allreduce(0, mail.asked, mail.agreed, MPI.MAX)]
            agreed = staging.arrive(mail.agreed, now=True)
            for shard_mail, part in mail.shared_parts():
                shard_mail.shared[...] = agreed[part]
        me, size = self.wire.rank, self.wire.size
        with self.wire.meter.stage("encode"):
            used = [m.encode(step, me, flags) for m in mail.first]
        for rank, m in enumerate(mail.first):
            self.book(m, used[rank] if rank != me else 0)
        if mail.fixed:
            send = [packet.SIZE + n for n in used]
            receive = [mail.first[me].outbox.size] * size
            starts = [rank * receive[0] for rank in range(size)]
            send[me] = receive[me] = 0
            yield [self.wire.alltoallv(2, (mail.outbox, send, mail.out_starts),
                                       (mail.inbox, receive, starts))]
            mail.inbox[starts[me]:][:mail.first[me].outbox.size] = mail.first[me].outbox
            headers = self.read_headers(mail.inbox, starts)
            mail.received = headers, list(_payloads(mail.inbox, headers, starts))
            return
        yield from mail.scatter.run(self, 1, (mail.outbox, mail.out_starts), used)
        mail.received = mail.scatter.headers, mail.scatter.payloads

    def _to_all(self, mail, step, flags):
        """Every owner's packet of its sum to all ranks."""
        if not mail.fixed:
            flags |= mail.scatter.hint << packet.HINT
        with self.wire.meter.stage("encode"):
            if mail.second.shared is not None:
                mail.second.measure(flags)
            used = mail.second.encode(step, self.wire.rank, flags)
        self.book(mail.second, used)
        if mail.fixed:
            lengths = [m.outbox.size for m in mail.first]
            starts = [sum(lengths[:rank]) for rank in range(self.wire.size)]
            yield from ring.gather(self.wire, 4, mail.second.index, mail.second.outbox, mail.result,
                                   lengths, even=False)
            mail.headers = self.read_headers(mail.result, starts)
            mail.payloads = list(_payloads(mail.result, mail.headers, starts))
            return
        yield from mail.gather_all.run(self, 3, mail.second.index, mail.second.outbox, used,
                                   [m.payload.size for m in mail.first])
        mail.headers, mail.payloads = mail.gather_all.headers, mail.gather_all.payloads
        mail.scatter.learn(mail.headers)

    def decode(self, mail, step, weight):
        mail.flat[...] = 0
        weight = 1.0 if self.adagrad else weight
        with staging.decoding(mail.grad):
            for rank, (m, payload) in enumerate(zip(mail.first, mail.payloads)):
                key = mail.second.key(step, rank)
                m.compressor.decode_add(payload, m.grad, m.layout, key, weight)
        for shard, m in zip(mail.shards, mail.first):
            shard.scatter(m.grad, mail.grad)


def _payloads(buffer, headers, starts):
    """What follows each of the headers at these offsets."""
    for header, at in zip(headers, starts):
        yield staging.arrive(buffer[at + packet.SIZE:][:header.length])


class _Bucket:
    """One bucket in the sharded exchange: P first mails, one a shard, and the owner's second."""

    def __init__(self, exchange, compressor, layout, index, grad, plan, seed):
        wire = exchange.wire
        self.exchange, self.rank = exchange, wire.rank
        self.compressor, self.layout, self.grad = compressor, layout, grad
        self.fixed = compressor.fixed
        self.zeros = zeros = kernels.of(grad).zeros
        self.shards = cut(layout, wire.size)
        self.flat = zeros(layout.size)
        starts = [0]
        for shard in self.shards:
            starts.append(starts[-1] + shard.layout.size)
        self.first = [Mail(compressor, shard.layout, index, self.flat[a:b], plan,
                           philox.part(seed, owner), wire)
                      for owner, (shard, a, b) in enumerate(zip(self.shards, starts, starts[1:]))]
        own = self.shards[self.rank].layout
        self.second = Mail(compressor, own, index, zeros(own.size), plan,
                           philox.part(seed, SECOND), wire)
        self.history = zeros(own.size) if exchange.adagrad else None
        self.history_ahead = zeros(own.size) if exchange.adagrad else None
        self._take_buffers(wire.size)
        self.headers = self.received = self.payloads = None

    def _take_buffers(self, size):
        """One outbox for all first packets, and room for what comes back."""
        zeros = staging.buffers_for(self.grad)
        self.out_starts = [0]
        for m in self.first:
            end = self.out_starts[-1] + m.outbox.size
            self.out_starts.append(end + -end % 4)  # whole words, which a GPU must have
        whole = self.out_starts.pop()
        if self.fixed:
            longest = max(m.outbox.size for m in self.first)
            self.exchange.wire.fits(max(whole, (size - 1) * longest))  # MPI counts up to the last
        self.outbox = zeros(whole, np.uint8)
        for m, at in zip(self.first, self.out_starts):
            m.outbox = self.outbox[at:at + m.outbox.size]
        sizes = [m.outbox.size for m in self.first]
        if self.fixed:
            self.inbox = zeros(size * sizes[self.rank], np.uint8)
            self.result = zeros(sum(sizes), np.uint8)
        else:
            wire = self.exchange.wire
            self.scatter = Scatter(wire, sizes, self.grad)
            self.gather_all = Gather(wire, max(sizes), self.grad)
            self.second.outbox = zeros(max(sizes), np.uint8)  # slots have one size for all
        measured = [m.shared.size for m in self.first if m.shared is not None]
        self.shared = self.zeros(sum(measured)) if measured else None
        self.asked, self.agreed = to_agree(self.grad, self.shared)

    def shared_parts(self):
        """(mail, its slice of `shared`) of each shard."""
        at = 0
        for m in self.first:
            yield m, slice(at, at + m.shared.size)
            at += m.shared.size

    def gather(self):
        """Bring the bucket into the order of the shards."""
        for shard, m in zip(self.shards, self.first):
            shard.gather(self.grad, m.grad)

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
            kernels.of(total).adagrad(total, self.history, self.history_ahead)
        return flags

    def replan(self, plan):
        for m in [*self.first, self.second]:
            m.replan(plan)

    def flagged(self, flag) -> list[int]:
        return [rank for rank, header in enumerate(self.headers) if header.flags & flag]

    def commit(self):
        for rank, m in enumerate(self.first):
            if rank != self.rank or self.exchange.own != "raw":
                m.commit()
        self.second.commit()
        if self.history is not None:
            self.history, self.history_ahead = self.history_ahead, self.history

    def persistent(self) -> dict:
        """{"error": first residuals, "error2": the owner's, zero elsewhere, "adagrad": ...}."""
        found = {}
        for shard, m in zip(self.shards, self.first):
            self._collect(found, shard, m.persistent())
        own = self.shards[self.rank]
        self._collect(found, own, {f"{k}2": v for k, v in self.second.persistent().items()})
        if self.history is not None:
            self._collect(found, own, {"adagrad": self.history})
        return found

    def _collect(self, found, shard, arrays):
        for kind, array in arrays.items():
            if kind not in found:
                found[kind] = self.zeros(self.layout.size)
            shard.scatter(array, found[kind])

    def restore(self, arrays):
        arrays = self._within_reach({k: staging.fetched(a) for k, a in arrays.items()})
        arrays = {kind: staging.fitting(array, self.grad) for kind, array in arrays.items()}
        for shard, m in zip(self.shards, self.first):
            for kind, array in m.persistent().items():
                shard.gather(arrays[kind], array)
        own = self.shards[self.rank]
        for kind, array in self.second.persistent().items():
            own.gather(arrays[f"{kind}2"], array)
        if self.history is not None:
            own.gather(arrays["adagrad"], self.history)

    def _within_reach(self, arrays):
        """Residuals that another cut of the bucket, or another number of ranks, left elsewhere.

        A second residual of elements that this rank does not own is owed by it all the same: it
        becomes part of the first. With own="raw" the first residual of its own elements is never
        looked at, and becomes part of the second. Nothing changes for a state of this same cut.
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
