"""Allreduce: MPI adds the payloads. For dense, for 16-bit casts, and for codes with a shared scale.

Headers are gathered beside the sum, so that a mismatch or a gradient that is not finite is known
to all ranks. What the ranks agreed on before (shared scales) does not travel again.
"""

import numpy as np

from mpicomp import kernels
from mpicomp.errors import NonFiniteError, PacketError
from mpicomp.exchange.base import Exchange
from mpicomp.transport import packet, ring, staging

_ops = {}  # kind of float: MPI operation, which nobody frees
PIECE = 1 << 14  # bytes of 16-bit floats that are widened and added at a time


class Allreduce(Exchange):
    """See the module. Replicas are identical because MPI gives every rank the same sum."""

    def check(self, compressor):
        if compressor.summable is None:
            return (f"MPI cannot add the payloads of {compressor!r}: use exchange=allgather")
        most = compressor.most_ranks
        if most is not None and self.wire.size > most:
            return (f"sums of {compressor.summable} codes are exact up to {most} ranks, this job "
                    f"has {self.wire.size}: use wider codes (packing=) or exchange=allgather")

    def prepare(self, mail):
        zeros = staging.buffers_for(mail.grad, reduced=True)
        alias = mail.compressor.alias(mail.grad)
        mail.alias = None if alias is None else staging.mirror(alias)
        mail.outbox = zeros(mail.outbox.size if alias is None else packet.SIZE, np.uint8)
        mail.header_box = zeros(mail.header_box.size, np.uint8)
        size = mail.compressor.capacity(mail.layout)
        mail.inbox, mail.ring = zeros(size, np.uint8), None
        if ring.suits(self.wire, mail.inbox, mail.compressor.summable):
            mail.ring = ring.Ring(self.wire, mail.grad.size)
            return
        dtype, _ = self._op(mail.compressor.summable)
        rest = size - mail.compressor.shared_bytes(mail.layout)
        self.wire.fits(rest // np.dtype(dtype).itemsize, f"elements of {np.dtype(dtype)}")

    def run(self, mail, step, flags):
        yield from self.agree(mail, flags)
        payload = mail.alias
        if payload is None:
            payload = mail.payload[:self.encode(mail, step, flags)]
        else:
            mail.stamp(packet.Header(step, mail.index, mail.plan, payload.size, flags))
            staging.leave(payload)
        used, shared = payload.size, mail.compressor.shared_bytes(mail.layout)
        dtype, op = self._op(mail.compressor.summable)
        requests = [self.wire.allgather(1, mail.outbox[:packet.SIZE], mail.header_box),
                    *staging.departure(payload)]
        if used > shared and mail.ring is None:
            requests.append(self.wire.allreduce(2, payload[shared:].view(dtype),
                                                mail.inbox[shared:used].view(dtype), op))
        yield requests
        mail.inbox[:shared] = payload[:shared]
        if mail.ring is not None:
            send, receive = staging.host(payload), staging.host(mail.inbox)
            yield from mail.ring.run(2, mail.index, send.view(dtype), receive.view(dtype))
        mail.sum = staging.arrive(mail.inbox)
        mail.headers = self.read_headers(mail.header_box,
                                         range(0, mail.header_box.size, packet.SIZE))

    def decode(self, mail, step, weight):
        if mail.alias is not None:
            return self._scale(mail, step, weight)
        with staging.decoding(mail.grad):
            mail.grad[...] = 0
            mail.compressor.decode_add(mail.sum, mail.grad, mail.layout,
                                       mail.key(step, self.wire.rank), weight)

    def _scale(self, mail, step, weight):
        """Headers say that all gradients are finite: if their sum is not, it was too large."""
        try:
            with staging.decoding(mail.grad):
                kernels.of(mail.grad).dense_scale(mail.sum, weight, mail.grad)
        except PacketError:
            raise NonFiniteError(
                f"step {step}, bucket {mail.index}: every rank's gradient is finite, but their sum "
                f"over {self.wire.size} ranks is beyond float32, also where average=True divides "
                "it afterwards: make the loss smaller, or take exchange=allgather, which divides "
                "first") from None

    def _op(self, kind):
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
