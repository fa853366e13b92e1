"""Hierarchical: the ranks of a node sum in full precision, one of them speaks to the other nodes.

Between nodes leaders exchange compressed packets by allgather; a node counts as one rank there, so
there are fewer packets to decode, and memory inside of a node is faster than any codec. Only
leaders have residuals. Replicas are identical because members take the sum from their leader.
"""

import numpy as np

from mpicomp import kernels, mpi
from mpicomp.errors import MismatchError
from mpicomp.exchange.allgather import Allgather
from mpicomp.exchange.base import Exchange, Mail
from mpicomp.transport import packet, ring
from mpicomp.transport.calls import Calls
from mpicomp.transport.packet import Header

node_of = mpi.node  # the ranks that share memory with this one, as a communicator


class Hierarchical(Exchange):
    """See the module. Rank 0 of each node, in the order of the ranks, is its leader."""

    stages = 1  # for all ranks: only where they disagree

    def __init__(self, wire):
        super().__init__(wire)
        node = node_of(wire.comm)
        self.node = Calls(node, wire.meter, within=True)
        self.node.open(4)
        leaders = mpi.split(wire.comm, "leaders", 0 if node.rank == 0 else 1)
        self.inner = Allgather(Calls(leaders, wire.meter)) if node.rank == 0 else None
        self.nodes = mpi.bcast(node, leaders.size, "counting nodes")

    def open(self, compressor, layout, index, grad, plan, seed):
        return _Bucket(self, compressor, layout, index, grad, plan, seed)

    @property
    def holders(self):
        return self.nodes

    @property
    def communicators(self):
        inner = self.inner.communicators if self.inner is not None else []
        return self.wire.communicators + self.node.communicators + inner

    def run(self, mail, step, flags):
        Header(step, mail.index, mail.plan, 0, flags).write(mail.header)
        yield [self.node.allgather(0, mail.header, mail.node_headers),
               self.node.reduce(1, mail.grad, mail.sum)]
        headers = [Header.read(mail.node_headers[at:])
                   for at in range(0, mail.node_headers.size, packet.SIZE)]
        if mail.inner is not None:
            yield from self._between_nodes(mail, step, headers)
        yield [self.node.bcast(2, mail.leader_headers), self.node.bcast(3, mail.grad)]
        mail.headers = [Header.read(mail.leader_headers[at:])
                        for at in range(0, mail.leader_headers.size, packet.SIZE)]
        if mail.flagged(packet.DISAGREE):  # all ranks read so, and all learn who it is
            everyone = np.zeros(packet.SIZE * self.wire.size, np.uint8)
            yield [self.wire.allgather(0, mail.header, everyone)]
            self.read_headers(everyone, range(0, everyone.size, packet.SIZE))

    def _between_nodes(self, mail, step, headers):
        """The leader's part: exchange the node's sum, decode the sum over nodes into mail.grad.

        A node whose ranks disagree takes part all the same, or the other nodes would wait for it.
        """
        bad = any(h.flags & packet.NONFINITE for h in headers)
        empty = all(h.flags & packet.EMPTY for h in headers)
        odd = len({(h.step, h.bucket, h.plan) for h in headers}) > 1
        if not bad and not kernels.of(mail.sum).finite(mail.sum):
            bad = True  # finite gradients whose sum is not
        flags = ((packet.NONFINITE if bad else 0) | (packet.EMPTY if empty else 0)
                 | (packet.DISAGREE if odd else 0)
                 | (packet.JOINED if any(h.flags & packet.JOINED for h in headers) else 0))
        mail.grad[...] = mail.sum
        try:
            yield from self.inner.run(mail.inner, step, flags)
            told = mail.inner.headers
        except MismatchError:  # between nodes: every leader finds it
            told = [Header(step, mail.index, mail.plan, 0, packet.DISAGREE)] * self.nodes
        for rank, header in enumerate(told):
            header.write(mail.leader_headers[rank * packet.SIZE:])
        if not any(header.flags & (packet.NONFINITE | packet.DISAGREE) for header in told):
            with self.wire.meter.stage("decode"):
                self.inner.decode(mail.inner, step, 1.0)

    def decode(self, mail, step, weight):
        mail.grad *= np.float32(weight)


class _Bucket:
    """One bucket: what members need, and the leader's mail to the other leaders."""

    def __init__(self, exchange, compressor, layout, index, grad, plan, seed):
        self._check(exchange, compressor, layout)
        zeros = kernels.of(grad).zeros
        self.index, self.grad, self.plan = index, grad, plan
        self.header = zeros(packet.SIZE, np.uint8)
        self.node_headers = zeros(packet.SIZE * exchange.node.size, np.uint8)
        self.leader_headers = zeros(packet.SIZE * exchange.nodes, np.uint8)
        self.headers, self.inner, self.sum = [], None, None
        if exchange.inner is not None:
            self.sum = zeros(layout.size)
            self.inner = Mail(compressor, layout, index, grad, plan, seed, exchange.inner.wire)
            exchange.inner.prepare(self.inner)

    @staticmethod
    def _check(exchange, compressor, layout):
        """Members refuse what their leader would, or they would wait for it."""
        exchange.node.fits(layout.size, "elements of float32")
        if compressor.fixed and not (exchange.nodes > 1 and ring.allowed()):
            exchange.wire.fits(packet.SIZE + compressor.capacity(layout))

    flagged = Mail.flagged

    def replan(self, plan):
        self.plan = plan
        if self.inner is not None:
            self.inner.replan(plan)

    def commit(self):
        if self.inner is not None:
            self.inner.commit()

    def persistent(self) -> dict:
        return {} if self.inner is None else self.inner.persistent()

    def restore(self, arrays):
        if self.inner is not None:
            self.inner.restore(arrays)
