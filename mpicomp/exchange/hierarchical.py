"""Hierarchical: ranks of a node sum in full precision, and one of them exchanges with other nodes.

Between nodes, leaders exchange compressed packets by allgather, in which a node counts as one rank:
there are fewer packets to decode, and memory within a node is faster than any codec. Only leaders
have residuals. Replicas are identical because members take the sum from their leader.
"""

import numpy as np

from mpicomp import kernels, mpi
from mpicomp.errors import MismatchError
from mpicomp.exchange.allgather import Allgather
from mpicomp.exchange.base import BucketExchange, Exchange, packet_size
from mpicomp.transport import packet, ring
from mpicomp.transport.calls import Calls
from mpicomp.transport.packet import Header

node_of = mpi.node  # the ranks that share memory with this one, as a communicator


class HierarchicalBucket(BucketExchange):
    """What every member needs; on leaders also `inner`, the bucket between nodes, and `sum`."""

    def __init__(self, exchange, compressor, layout, index, grad, plan, seed):
        self._check(exchange, compressor, layout)
        zeros = kernels.of(grad).zeros
        self.plan = plan
        self.header = zeros(packet.SIZE, "uint8")
        self.node_headers = zeros(packet.SIZE * exchange.node.size, "uint8")
        self.leader_headers = zeros(packet.SIZE * exchange.nodes, "uint8")
        self.inner = self.sum = None
        if exchange.inner is not None:
            self.sum = zeros(layout.size)
            self.inner = exchange.inner.open(compressor, layout, index, grad, plan, seed)
        super().__init__(layout, index, grad, self.inner.codecs if self.inner else ())

    @staticmethod
    def _check(exchange, compressor, layout):
        """Run the leader's checks on every member, so that none waits for a leader that raised."""
        exchange.node.fits(layout.size, "elements of float32")
        if compressor.fixed and not (exchange.nodes > 1 and ring.allowed()):
            exchange.wire.fits(packet_size(compressor, layout))

    def replan(self, plan):
        self.plan = plan
        super().replan(plan)


class Hierarchical(Exchange):
    """Full precision within a node, compressed packets between nodes.

    Rank 0 of each node, in the order of the ranks, is its leader. The cost is predicted as if each
    node had one rank.
    """

    name = "hierarchical"
    bucket = HierarchicalBucket
    stages = 1  # for all ranks: only where they disagree

    def __post_init__(self, wire):
        super().__post_init__(wire)
        node = node_of(wire.comm)
        self.node = Calls(node, wire.meter, within=True)
        self.node.open(4)
        leaders = mpi.split(wire.comm, "leaders", 0 if node.rank == 0 else 1)
        self.inner = Allgather(Calls(leaders, wire.meter)) if node.rank == 0 else None
        self.nodes = mpi.bcast(node, leaders.size, "counting nodes")

    @property
    def holders(self):
        return self.nodes

    @property
    def communicators(self):
        inner = self.inner.communicators if self.inner is not None else []
        return self.wire.communicators + self.node.communicators + inner

    def run(self, bucket, step, flags):
        Header(step, bucket.index, bucket.plan, 0, flags).write(bucket.header)
        yield [self.node.allgather(0, bucket.header, bucket.node_headers),
               self.node.reduce(1, bucket.grad, bucket.sum)]
        if bucket.inner is not None:
            yield from self._between_nodes(bucket, step, _headers(bucket.node_headers))
        yield [self.node.bcast(2, bucket.leader_headers), self.node.bcast(3, bucket.grad)]
        bucket.headers = _headers(bucket.leader_headers)
        if bucket.flagged(packet.DISAGREE):  # all ranks read so, and all learn who it is
            everyone = kernels.of(bucket.grad).zeros(packet.SIZE * self.wire.size, "uint8")
            yield [self.wire.allgather(0, bucket.header, everyone)]
            self.read_headers(everyone, range(0, everyone.size, packet.SIZE))

    def _between_nodes(self, bucket, step, headers):
        """The leader's part: exchange the node's sum, decode the sum over nodes into bucket.grad.

        A node whose ranks disagree takes part all the same, or the other nodes would wait for it.
        """
        bad = any(h.flags & packet.NONFINITE for h in headers)
        empty = all(h.flags & packet.EMPTY for h in headers)
        odd = len({(h.step, h.bucket, h.plan) for h in headers}) > 1
        if not bad and not kernels.of(bucket.sum).finite(bucket.sum):
            bad = True  # finite gradients whose sum is not
        flags = ((packet.NONFINITE if bad else 0) | (packet.EMPTY if empty else 0)
                 | (packet.DISAGREE if odd else 0)
                 | (packet.JOINED if any(h.flags & packet.JOINED for h in headers) else 0))
        bucket.grad[...] = bucket.sum
        try:
            yield from self.inner.run(bucket.inner, step, flags)
            told = bucket.inner.headers
        except MismatchError:  # between nodes: every leader finds it
            told = [Header(step, bucket.index, bucket.plan, 0, packet.DISAGREE)] * self.nodes
        for rank, header in enumerate(told):
            header.write(bucket.leader_headers[rank * packet.SIZE:])
        if not any(header.flags & (packet.NONFINITE | packet.DISAGREE) for header in told):
            with self.wire.meter.stage("decode"):
                self.inner.decode(bucket.inner, step, 1.0)

    def decode(self, bucket, step, weight):
        bucket.grad *= np.float32(weight)


def _headers(buffer):
    """All headers in a buffer, not compared."""
    return [Header.read(buffer[at:]) for at in range(0, buffer.size, packet.SIZE)]
