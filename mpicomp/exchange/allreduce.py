"""Allreduce: MPI adds the payloads. For dense, 16-bit casts, codes with a shared scale, factors.

Headers are gathered beside the sum, so that all ranks learn of a mismatch or of a gradient that is
not finite. What ranks agreed on before (shared scales, a factor) is not sent again. Replicas are
identical because MPI gives every rank the same sum.
"""

import numpy as np

from mpicomp import kernels
from mpicomp.compressors import Residual
from mpicomp.errors import NonFiniteError, PacketError
from mpicomp.exchange.base import BucketExchange, Cost, Exchange, WholeBucket
from mpicomp.transport import packet, ring, staging

_ops = {}  # kind of float: MPI operation, which nobody frees
PIECE = 1 << 14  # bytes of 16-bit floats that are widened and added at a time


class AllreduceBucket(WholeBucket):
    """Buffers of the sum and of the headers; the outbox is a header only if the gradient itself,
    as it lies in memory, is the payload (`alias`)."""

    def __init__(self, exchange, compressor, layout, index, grad, plan, seed):
        zeros, alias = staging.buffers_for(grad, reduced=True), compressor.alias(grad)
        wire, size = exchange.wire, compressor.capacity(layout)
        outbox = zeros(packet.SIZE + (size if alias is None else 0), "uint8")
        super().__init__(exchange, compressor, layout, index, grad, plan, seed, outbox)
        self.alias = None if alias is None else staging.mirror(alias)
        self.header_box = zeros(packet.SIZE * wire.size, "uint8")
        self.inbox, self.ring, self.sum = zeros(size, "uint8"), None, None
        dtype, _ = exchange.operation(compressor.summable)
        added = self.inbox[compressor.shared_bytes(layout):]
        count = added.nbytes // np.dtype(dtype).itemsize
        if ring.suits(wire, added, compressor.summable):
            self.ring = ring.Ring(wire, count)
        else:
            wire.fits(count, f"elements of {np.dtype(dtype)}")

    def own(self, step, rank):
        if self.alias is not None:  # the mean has taken its place
            return BucketExchange.own(self, step, rank)
        return super().own(step, rank)


class Allreduce(Exchange):
    """MPI adds the payloads; for dense, 16-bit casts and codes with a shared scale."""

    name = "allreduce"
    bucket = AllreduceBucket
    adds = on_device = True

    @classmethod
    def refusal(cls, compressor):
        if compressor.summable is None:
            return f"MPI cannot add the payloads of {compressor!r}: use exchange=allgather"
        if isinstance(compressor, Residual) and "float16" in compressor.summable:
            return ("MPI's sum of 16-bit floats rounds, and with feedback=yes nobody would owe "
                    "that: use exchange=allgather")

    @classmethod
    def cost(cls, ranks):
        return Cost(2 * (ranks - 1) / ranks)

    def check(self, compressor):
        if problem := super().check(compressor):
            return problem
        most = compressor.most_ranks
        if most is not None and self.wire.size > most:
            return (f"sums of {compressor.summable} codes are exact up to {most} ranks, this job "
                    f"has {self.wire.size}: use wider codes (packing=) or exchange=allgather")

    def run(self, bucket, step, flags):
        codec = bucket.codec
        yield from self.agree(codec, flags)
        payload = bucket.alias
        if payload is None:
            payload = codec.payload[:self.encode(codec, step, flags)]
        else:
            codec.stamp(packet.Header(step, bucket.index, codec.plan, payload.size, flags))
            staging.leave(payload)
        used, shared = payload.size, codec.compressor.shared_bytes(bucket.layout)
        dtype, op = self.operation(codec.compressor.summable)
        requests = [self.wire.allgather(1, codec.outbox[:packet.SIZE], bucket.header_box),
                    *staging.departure(payload)]
        if used > shared and bucket.ring is None:
            requests.append(self.wire.allreduce(2, payload[shared:].view(dtype),
                                                bucket.inbox[shared:used].view(dtype), op))
        yield requests
        bucket.inbox[:shared] = payload[:shared]
        if bucket.ring is not None:
            send, receive = staging.host(payload), staging.host(bucket.inbox)
            yield from bucket.ring.run(2, bucket.index, send[shared:].view(dtype),
                                       receive[shared:used].view(dtype))
        bucket.sum = staging.arrive(bucket.inbox)
        bucket.headers = self.read_headers(bucket.header_box,
                                           range(0, bucket.header_box.size, packet.SIZE))

    def decode(self, bucket, step, weight):
        if bucket.alias is not None:
            return self._scale(bucket, step, weight)
        codec = bucket.codec
        with staging.decoding(bucket.grad):
            bucket.grad[...] = 0
            codec.compressor.decode_add(bucket.sum, bucket.grad, bucket.layout,
                                        codec.key(step, self.wire.rank), weight)
            codec.learn(bucket.sum, step, self.wire.rank)

    def _scale(self, bucket, step, weight):
        """Headers say that all gradients are finite: if their sum is not, it was too large."""
        try:
            with staging.decoding(bucket.grad):
                kernels.of(bucket.grad).dense_scale(bucket.sum, weight, bucket.grad)
        except PacketError:
            raise NonFiniteError(
                f"step {step}, bucket {bucket.index}: every rank's gradient is finite, but their "
                f"sum over {self.wire.size} ranks is beyond float32, also where average=True "
                "divides it afterwards: make the loss smaller, or take exchange=allgather, which "
                "divides first") from None

    @staticmethod
    def operation(kind):
        """(dtype, MPI operation) that adds this kind of number; MPI itself has no 16-bit floats."""
        from mpi4py import MPI

        if kind not in ("float16", "bfloat16"):
            return kind, MPI.SUM
        if kind not in _ops:

            def add(incoming, inout, datatype):
                k = kernels.reference
                a, b = (np.frombuffer(side, np.uint8) for side in (incoming, inout))
                for at in range(0, a.size, PIECE):  # what is widened stays small, and in the cache
                    x, y = a[at:at + PIECE], b[at:at + PIECE]
                    k.cast_encode(k.cast_widen(x, kind) + k.cast_widen(y, kind), kind, y)

            _ops[kind] = MPI.Op.Create(add, commute=True)
        return np.uint16, _ops[kind]
