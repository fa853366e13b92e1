"""Allgather: encode once, everybody decodes everybody in rank order. For any compressor.

Fixed lengths travel in one call, header and payload together. Where the length depends on the
data, the headers travel first and tell how many bytes each rank used; only those follow. Each rank
receives P - 1 packets, so this moves fewer bytes than a dense ring while P < 2 * ratio.
"""

import numpy as np

from mpicomp import kernels, packet
from mpicomp.exchange.mail import Exchange


class Allgather(Exchange):
    """See the module. The sum is taken in rank order, this rank's own packet included."""

    def prepare(self, mail):
        zeros = kernels.of(mail.grad).zeros
        if mail.compressor.fixed:
            mail.inbox = zeros(mail.outbox.size * self.wire.size, np.uint8)
        else:
            mail.inbox = zeros(0, np.uint8)

    def run(self, mail, step, flags):
        yield from self.agree(mail, flags)
        used = self.encode(mail, step, flags)
        if mail.compressor.fixed:
            yield [self.wire.allgather(1, mail.outbox, mail.inbox)]
            size = mail.outbox.size
            mail.headers = self.read_headers(mail.inbox, range(0, size * self.wire.size, size))
            return
        yield [self.wire.allgather(1, mail.outbox[:packet.SIZE], mail.header_box)]
        mail.headers = self.read_headers(mail.header_box,
                                         range(0, mail.header_box.size, packet.SIZE))
        lengths = self.lengths(mail.headers, [mail.payload.size] * self.wire.size)
        if sum(lengths) > mail.inbox.size:  # grows in the first steps, then has room to spare
            mail.inbox = kernels.of(mail.grad).zeros(sum(lengths) * 5 // 4, np.uint8)
        # nothing to send is a posting too: every bucket makes the same number of them
        yield [self.wire.allgatherv(2, mail.payload[:used], mail.inbox, lengths)
               ] if sum(lengths) else []

    def decode(self, mail, step, weight):
        keys = [mail.key(step, rank) for rank in range(self.wire.size)]
        mail.compressor.decode_sum(list(self._payloads(mail)), mail.grad, mail.layout, keys, weight)

    def _payloads(self, mail):
        if mail.compressor.fixed:
            for rank in range(self.wire.size):
                at = rank * mail.outbox.size + packet.SIZE
                yield mail.inbox[at:at + mail.headers[rank].length]
            return
        at = 0
        for header in mail.headers:
            yield mail.inbox[at:at + header.length]
            at += header.length
