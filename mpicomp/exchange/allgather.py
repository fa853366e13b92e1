"""Allgather: encode once, everybody decodes everybody in rank order. For any compressor.

Fixed lengths travel in one call, header and payload together. Where the length depends on the
data, small packets travel in one call, too, most of the time (slots.py); of large ones the headers
travel first and tell how many bytes each rank used, and only those follow. Each rank receives
P - 1 packets, so this moves fewer bytes than a dense ring while P < 2 * ratio.
"""

import numpy as np

from mpicomp.exchange.base import Exchange
from mpicomp.transport import packet, ring, staging
from mpicomp.transport.slots import Gather


class Allgather(Exchange):
    """See the module. The sum is taken in rank order, this rank's own packet included."""

    def prepare(self, mail):
        mail.gather, mail.payloads = None, []
        if mail.compressor.fixed:
            if not ring.passes_on(self.wire, mail.outbox.size):
                self.wire.fits(mail.outbox.size)
            zeros = staging.buffers_for(mail.grad)
            mail.inbox = zeros(mail.outbox.size * self.wire.size, np.uint8)
        else:
            mail.gather = Gather(self.wire, mail.outbox.size, mail.grad)

    def run(self, mail, step, flags):
        yield from self.agree(mail, flags)
        used = self.encode(mail, step, flags)
        if mail.gather is not None:
            most = [mail.payload.size] * self.wire.size
            yield from mail.gather.run(self, 1, mail.index, mail.outbox, used, most)
            mail.headers, mail.payloads = mail.gather.headers, mail.gather.payloads
            return
        size = mail.outbox.size
        yield from ring.gather(self.wire, 1, mail.index, mail.outbox, mail.inbox,
                               [size] * self.wire.size)
        mail.headers = self.read_headers(mail.inbox, range(0, size * self.wire.size, size))
        mail.payloads = list(self._fixed(mail))

    def decode(self, mail, step, weight):
        keys = [mail.key(step, rank) for rank in range(self.wire.size)]
        with staging.decoding(mail.grad):
            mail.compressor.decode_sum(mail.payloads, mail.grad, mail.layout, keys, weight)

    def _fixed(self, mail):
        for rank in range(self.wire.size):
            at = rank * mail.outbox.size + packet.SIZE
            yield staging.arrive(mail.inbox[at:at + mail.headers[rank].length])
