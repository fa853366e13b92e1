"""Allgather: every rank encodes once and decodes the packets of all ranks. For any compressor.

Packets of fixed length travel in one call, header and payload together. Where the length depends
on the data the headers travel first and tell how many bytes each rank used, and only those follow.
Each rank receives P - 1 packets, so this moves fewer bytes than a ring of dense gradients while
P < 2 * ratio.
"""

from mpicomp.exchange.base import Exchange, WholeBucket
from mpicomp.transport import packet, ring, staging
from mpicomp.transport.lengths import Gather


class AllgatherBucket(WholeBucket):
    """The packets of all ranks: in `inbox` if their length is fixed, else in `gather`."""

    def __init__(self, exchange, *arguments):
        super().__init__(exchange, *arguments)
        self.gather, self.inbox, self.payloads = None, None, []
        wire, size = exchange.wire, self.codec.outbox.size
        if not self.codec.compressor.fixed:
            self.gather = Gather(wire, self.grad)
            return
        if not ring.passes_on(wire, size):
            wire.fits(size)
        self.inbox = staging.buffers_for(self.grad)(size * wire.size, "uint8")


class Allgather(Exchange):
    """Every packet to every rank, added up in rank order; for any compressor."""

    name = "allgather"
    bucket = AllgatherBucket
    on_device = True

    def run(self, bucket, step, flags):
        codec, ranks = bucket.codec, self.wire.size
        yield from self.agree(codec, flags)
        self.encode(codec, step, flags)
        size = codec.outbox.size
        if bucket.gather is not None:
            yield from bucket.gather.run(self, 1, bucket.index, codec.outbox,
                                         [codec.payload.size] * ranks)
            bucket.headers, bucket.payloads = bucket.gather.headers, bucket.gather.payloads
            return
        yield from ring.gather(self.wire, 1, bucket.index, codec.outbox, bucket.inbox,
                               [size] * ranks)
        starts = range(0, size * ranks, size)
        bucket.headers = self.read_headers(bucket.inbox, starts)
        bucket.payloads = [staging.arrive(bucket.inbox[at + packet.SIZE:][:header.length])
                           for at, header in zip(starts, bucket.headers)]

    def decode(self, bucket, step, weight):
        codec = bucket.codec
        keys = [codec.key(step, rank) for rank in range(self.wire.size)]
        with staging.decoding(bucket.grad):
            codec.compressor.decode_sum(bucket.payloads, bucket.grad, bucket.layout, keys, weight)
