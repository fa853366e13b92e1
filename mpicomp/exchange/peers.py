"""Peers: every rank sends its packets to every other and applies what has arrived by then.

The exchange of Strom 2015: no server, no barrier, no collective in a step. Every rank applies every
packet exactly once, in the step in which it arrives there. So all ranks apply the same sum in the
end, in different orders: replicas agree up to rounding, only after `Reducer.deliver`, and only if
the optimizer is linear (plain SGD).

`staleness` bounds how far ranks drift apart: in step s a rank waits until it has every other rank's
packets of step s - staleness. 0 is lock step, with the same bits as allgather.
"""

from dataclasses import dataclass

from mpicomp.compressors.options import option
from mpicomp.exchange.asynchronous import Asynchronous, PendingRanks
from mpicomp.exchange.base import WholeBucket
from mpicomp.transport import packet
from mpicomp.transport.packet import Header


class PeersBucket(WholeBucket):
    """Its packets count as said, and its residual as past, as soon as they are sent.

    waiting  (step, rank, parcel) of the packets that are not applied yet, this rank's included
    """

    def __init__(self, exchange, *arguments):
        super().__init__(exchange, *arguments)
        self.rank, self.flags, self.waiting = exchange.wire.rank, 0, []

    def encode(self, step, flags) -> int:
        """Fill the outbox; returns the bytes of the payload.

        Without a gradient, or with one that is not finite, the packet is a header only, and the
        residual stays as it is.
        """
        self.flags = flags
        if flags:
            self.codec.stamp(Header(step, self.index, self.codec.plan, 0, flags))
            return 0
        if self.codec.shared is not None:
            self.codec.measure(flags)
        used = self.codec.encode(step, self.rank, flags)
        self.codec.commit()
        return used

    def put(self, step, rank, parcel):
        """Keep a packet to be applied; one without a gradient is released."""
        if Header.read(parcel.data).flags:
            parcel.release()
        else:
            self.waiting.append((step, rank, parcel))

    def due(self, horizon):
        """The packets of steps up to `horizon`, by step and rank."""
        return sorted((letter for letter in self.waiting if letter[0] <= horizon),
                      key=lambda letter: letter[:2])

    def flagged(self, flag):
        """Only this rank: other ranks' packets without a gradient are not kept."""
        return [self.rank] if flag & self.flags & packet.NONFINITE else []

    def commit(self):
        """Done when the packet was sent."""


@dataclass(eq=False, repr=False)
class Peers(Asynchronous):
    """Asynchronous, packets from every rank to every other (Strom 2015); end with deliver().

    Where other exchanges agree on a scale, each rank uses its own, which its packets carry.
    """

    name = "peers"
    bucket = PeersBucket

    staleness: int = option(4, "how many steps a rank may be ahead of what it has heard of "
                               "another; 0 is lock step", least=0)

    def __post_init__(self, wire):
        super().__post_init__(wire)
        self.buckets = {}

    def open(self, compressor, layout, index, grad, plan, seed):
        self.plan = plan
        self.buckets[index] = super().open(compressor, layout, index, grad, plan, seed)
        return self.buckets[index]

    def run(self, bucket, step, flags):
        self.settled = False
        codec = bucket.codec
        with self.wire.meter.stage("encode"):
            used = bucket.encode(step, flags)
        with self.lock:
            parcel = self.post.new_message(packet.SIZE + used)
            parcel.data[:] = codec.outbox[:parcel.size]
            for rank in self.post.others:
                self.post.send(parcel, rank, bucket.index)
                self.book(codec, used)
            bucket.put(step, self.wire.rank, parcel)
        yield [PendingRanks(self.poll, lambda: self._behind(bucket.index, step))]
        bucket.headers = [Header.read(parcel.data)
                          for _, _, parcel in bucket.due(self._horizon(step))]

    def _behind(self, index, step):
        """The ranks whose packets of step - staleness are not here."""
        return [rank for rank in self.post.others if rank not in self.gone
                and self.awaited(rank, index) <= step - self.staleness]

    def _horizon(self, step):
        """The last step whose packets are applied in this rank's `step`."""
        return step if self.staleness == 0 else float("inf")

    def bucket_of(self, tag):
        return tag if tag in self.buckets else "of this model"

    def take(self, rank, tag, header, parcel):
        self.buckets[tag].put(header.step, rank, parcel)

    def decode(self, bucket, step, weight):
        """bucket.grad becomes weight * the sum of all packets that are due, each counted once."""
        letters = bucket.due(self._horizon(step))
        if not letters:
            bucket.grad[...] = 0
            return
        bucket.codec.compressor.decode_sum(
            [parcel.data[packet.SIZE:] for _, _, parcel in letters], bucket.grad, bucket.layout,
            [bucket.codec.key(step, rank) for step, rank, _ in letters], weight)
        for letter in letters:
            bucket.waiting.remove(letter)
            letter[2].release()

    def rest_of(self, bucket, weight) -> bool:
        """Decode what is left after `settle`; False, and zeros in bucket.grad, if nothing is."""
        left = bool(bucket.waiting)
        self.decode(bucket, float("inf"), weight)
        return left
